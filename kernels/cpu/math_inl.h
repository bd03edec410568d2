// Elementary functions on sixteen lanes, written with explicit fused multiply-adds so that every instruction set gives
// the same bits. Included once per instruction set, after its vec_*.h.
//
// Polynomials: Cephes expf and logf (Moshier, netlib.org/cephes), their evaluation re-ordered for fma. Measured against
// double over all of the ranges used (tests/kernels/math_test.cc): Exp <= 1.1 ulp where the result is normal, Log <= 1
// ulp, NegLogOneMinus and Sigmoid <= 2.5 ulp.
#pragma once

namespace nibble::NIBBLE_ISA {

// e^x. 0 below -104, +inf above 88.73, subnormal results rounded twice; NaN stays NaN.
inline Vec Exp(Vec x) {
  x = Min(Vec::Set(89.0f), Max(Vec::Set(-105.0f), x));  // in this operand order both let NaN through
  const Vec n = RoundEven(x * Vec::Set(1.44269504088896341f));
  Vec r = Fma(n, Vec::Set(-0.693359375f), x);
  r = Fma(n, Vec::Set(2.12194440e-4f), r);
  Vec p = Vec::Set(1.9875691500e-4f);
  p = Fma(p, r, Vec::Set(1.3981999507e-3f));
  p = Fma(p, r, Vec::Set(8.3334519073e-3f));
  p = Fma(p, r, Vec::Set(4.1665795894e-2f));
  p = Fma(p, r, Vec::Set(1.6666665459e-1f));
  p = Fma(p, r, Vec::Set(5.0000001201e-1f));
  p = Fma(p, r * r, r) + Vec::Set(1.0f);
  // p · 2^n in two steps, as 2^n itself need not be a normal number.
  const IVec exponent = ToInt(n);
  const IVec half = ShiftRightSigned<1>(exponent);
  const Vec first = FromBits(ShiftLeft<23>(half + IVec::Set(127)));
  const Vec second = FromBits(ShiftLeft<23>(exponent - half + IVec::Set(127)));
  return p * first * second;
}

// ln(2^e · (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)).
inline Vec LogOfParts(Vec f, Vec e) {
  const Vec z = f * f;
  Vec p = Vec::Set(7.0376836292e-2f);
  p = Fma(p, f, Vec::Set(-1.1514610310e-1f));
  p = Fma(p, f, Vec::Set(1.1676998740e-1f));
  p = Fma(p, f, Vec::Set(-1.2420140846e-1f));
  p = Fma(p, f, Vec::Set(1.4249322787e-1f));
  p = Fma(p, f, Vec::Set(-1.6668057665e-1f));
  p = Fma(p, f, Vec::Set(2.0000714765e-1f));
  p = Fma(p, f, Vec::Set(-2.4999993993e-1f));
  p = Fma(p, f, Vec::Set(3.3333331174e-1f));
  Vec y = Fma(e, Vec::Set(-2.12194440e-4f), f * z * p);
  y = Fma(z, Vec::Set(-0.5f), y);
  return Fma(e, Vec::Set(0.693359375f), f + y);
}

// Splits a positive normal x into 2^e · m, m in [sqrt(1/2), sqrt(2)).
inline void SplitExponent(Vec x, Vec* m, Vec* e) {
  const IVec shifted = Bits(x) - IVec::Set(0x3f3504f3);  // bits of sqrt(1/2)
  const IVec exponent = ShiftRightSigned<23>(shifted);
  *e = ToFloat(exponent);
  *m = FromBits(Bits(x) - ShiftLeft<23>(exponent));
}

// ln(x) of a positive, normal, finite x.
inline Vec Log(Vec x) {
  Vec m, e;
  SplitExponent(x, &m, &e);
  return LogOfParts(m - Vec::Set(1.0f), e);
}

// -ln(1 - v) for v in [2^-32, 1 - 2^-24], to full relative precision also for small v.
inline Vec NegLogOneMinus(Vec v) {
  Vec m, e;
  SplitExponent(Vec::Set(1.0f) - v, &m, &e);
  // Where 1 - v needs no scaling, f = -v exactly, though 1 - v was rounded.
  const Vec small = Vec::Set(0.29f);
  const Vec f = SelectLess(v, small, Vec::Zero() - v, m - Vec::Set(1.0f));
  return Vec::Zero() - LogOfParts(f, SelectLess(v, small, Vec::Zero(), e));
}

// 1 / (1 + e^-x).
inline Vec Sigmoid(Vec x) { return Vec::Set(1.0f) / (Vec::Set(1.0f) + Exp(Vec::Zero() - x)); }

inline float FirstLane(Vec x) {
  float lanes[kLanes];
  x.Store(lanes);
  return lanes[0];
}
inline float Exp(float x) { return FirstLane(Exp(Vec::Set(x))); }
inline float Log(float x) { return FirstLane(Log(Vec::Set(x))); }

}  // namespace nibble::NIBBLE_ISA
