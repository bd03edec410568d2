// The elementary functions of kernels/cpu/math_inl.h, operation for operation, so that the GPU computes the CPU's bits.
// What is a fused multiply-add there is one here; the build's --fmad=false keeps the compiler from adding others.
// Accuracy and sources: there.
#pragma once

namespace nibble::cuda {

// e^x / 2^n, where n is the integer nearest to x / ln 2.
__device__ __forceinline__ float ExpOfRemainder(float x, float n) {
  float r = __fmaf_rn(n, -0.693359375f, x);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  return __fmaf_rn(p, r * r, r) + 1.0f;
}

// e^x. 0 below -104, +inf above 88.73, subnormal results rounded twice; NaN stays NaN.
__device__ __forceinline__ float Exp(float x) {
  x = -105.0f > x ? -105.0f : x;  // in this operand order both comparisons let NaN through
  x = 89.0f < x ? 89.0f : x;
  const float n = rintf(x * 1.44269504088896341f);
  const float p = ExpOfRemainder(x, n);
  // p · 2^n in two steps, as 2^n itself need not be a normal number.
  const int exponent = __float2int_rn(n);
  const int half = exponent >> 1;
  return p * __int_as_float((half + 127) << 23) * __int_as_float((exponent - half + 127) << 23);
}

// ln(2^e · (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ float LogOfParts(float f, float e) {
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = __fmaf_rn(p, f, -1.1514610310e-1f);
  p = __fmaf_rn(p, f, 1.1676998740e-1f);
  p = __fmaf_rn(p, f, -1.2420140846e-1f);
  p = __fmaf_rn(p, f, 1.4249322787e-1f);
  p = __fmaf_rn(p, f, -1.6668057665e-1f);
  p = __fmaf_rn(p, f, 2.0000714765e-1f);
  p = __fmaf_rn(p, f, -2.4999993993e-1f);
  p = __fmaf_rn(p, f, 3.3333331174e-1f);
  float y = __fmaf_rn(e, -2.12194440e-4f, f * z * p);
  y = __fmaf_rn(z, -0.5f, y);
  return __fmaf_rn(e, 0.693359375f, f + y);
}

// Splits a positive normal x into 2^e · m, m in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ void SplitExponent(float x, float* m, float* e) {
  const int exponent = (__float_as_int(x) - 0x3f3504f3) >> 23;  // bits of sqrt(1/2)
  *e = static_cast<float>(exponent);
  *m = __int_as_float(__float_as_int(x) - (exponent << 23));
}

// ln(x) of a positive, normal, finite x.
__device__ __forceinline__ float Log(float x) {
  float m, e;
  SplitExponent(x, &m, &e);
  return LogOfParts(m - 1.0f, e);
}

// -ln(1 - v) for v in [2^-32, 1 - 2^-24], to full relative precision also for small v.
__device__ __forceinline__ float NegLogOneMinus(float v) {
  float m, e;
  SplitExponent(1.0f - v, &m, &e);
  // Where 1 - v needs no scaling, f = -v exactly, though 1 - v was rounded.
  const bool small = v < 0.29f;
  return 0.0f - LogOfParts(small ? 0.0f - v : m - 1.0f, small ? 0.0f : e);
}

// 1 / (1 + e^-x).
__device__ __forceinline__ float Sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + Exp(0.0f - x)); }

// 1 / (1 + e^-x) with the same bits, for x of at least kShortSigmoidFrom: e^-x then stays far
// from overflow, and where it is no normal number it vanishes in the sum. NaN gives a number.
inline constexpr float kShortSigmoidFrom = -86.0f;
__device__ __forceinline__ float ShortSigmoid(float x) {
  const float y = fmaxf(0.0f - x, -87.0f);
  const float shifted = y * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, left in the low bits
  const float n = shifted - 12582912.0f;
  const float p = ExpOfRemainder(y, n);
  const float sum = 1.0f + __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));  // 1 + p · 2^n
  // An approximation and one Newton step round a reciprocal correctly where nothing is subnormal, as in __frcp_rn.
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(sum));
  return __fmaf_rn(reciprocal, __fmaf_rn(-sum, reciprocal, 1.0f), reciprocal);
}

}  // namespace nibble::cuda
