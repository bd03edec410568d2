// Sixteen float or int32 lanes in plain C++: the definition of what the AVX2 and AVX-512 forms compute. Every operation
// is exactly rounded or exact, so all three give the same bits (NaN payloads aside).
//
// Included by kernels_portable.cc only, inside nothing; vec_avx2.h and vec_avx512.h define the same names for their
// instruction sets.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/base/float16.h"

namespace nibble::NIBBLE_ISA {

inline constexpr int kLanes = 16;

struct IVec {
  int32_t v[kLanes];

  static IVec Set(int32_t x) {
    IVec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  static IVec Zero() { return Set(0); }
  static IVec Iota() {
    IVec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = i;
    return r;
  }
  static IVec Load(const void* p) {
    IVec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static IVec LoadU8(const uint8_t* p) {
    IVec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
    return r;
  }
  static IVec LoadI8(const int8_t* p) {
    IVec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
    return r;
  }
  void Store(void* p) const { std::memcpy(p, v, sizeof(v)); }
  void StoreI8(int8_t* p) const {  // values in -128..127
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(v[i]);
  }
};

#define NIBBLE_LANEWISE(name, expression)                                                  \
  inline IVec name(IVec a, IVec b) {                                                       \
    IVec r;                                                                                \
    for (int i = 0; i < kLanes; ++i) {                                                     \
      const uint32_t x = static_cast<uint32_t>(a.v[i]), y = static_cast<uint32_t>(b.v[i]); \
      r.v[i] = static_cast<int32_t>(expression);                                           \
    }                                                                                      \
    return r;                                                                              \
  }
NIBBLE_LANEWISE(operator+, x + y)
NIBBLE_LANEWISE(operator-, x - y)
NIBBLE_LANEWISE(operator*, x* y)
NIBBLE_LANEWISE(operator&, x& y)
NIBBLE_LANEWISE(operator|, x | y)
NIBBLE_LANEWISE(operator^, x ^ y)
NIBBLE_LANEWISE(MulHighU32, static_cast<uint32_t>((static_cast<uint64_t>(x) * y) >> 32))
NIBBLE_LANEWISE(Max, (static_cast<int32_t>(x) > static_cast<int32_t>(y)) ? x : y)
#undef NIBBLE_LANEWISE

template <int kBits>
inline IVec ShiftLeft(IVec a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits);
  return a;
}
template <int kBits>
inline IVec ShiftRight(IVec a) {  // zeros come in
  for (int i = 0; i < kLanes; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits);
  return a;
}
template <int kBits>
inline IVec ShiftRightSigned(IVec a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] >>= kBits;
  return a;
}
inline int32_t ReduceAdd(IVec a) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<uint32_t>(a.v[i]);
  return static_cast<int32_t>(sum);
}
inline int32_t ReduceMax(IVec a) {
  int32_t m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

struct Vec {
  float v[kLanes];

  static Vec Set(float x) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  static Vec Zero() { return Set(0.0f); }
  static Vec Load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static Vec LoadBF16(const BF16* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = ToFloat(p[i]);
    return r;
  }
  static Vec LoadF16(const F16* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = ToFloat(p[i]);
    return r;
  }
  void Store(float* p) const { std::memcpy(p, v, sizeof(v)); }
  void StoreBF16(BF16* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = ToBF16(v[i]);
  }
};

#define NIBBLE_LANEWISE(name, expression) \
  inline Vec name(Vec a, Vec b) {         \
    for (int i = 0; i < kLanes; ++i) {    \
      const float x = a.v[i], y = b.v[i]; \
      a.v[i] = (expression);              \
    }                                     \
    return a;                             \
  }
NIBBLE_LANEWISE(operator+, x + y)
NIBBLE_LANEWISE(operator-, x - y)
NIBBLE_LANEWISE(operator*, x* y)
NIBBLE_LANEWISE(operator/, x / y)
NIBBLE_LANEWISE(Max, x > y ? x : y)  // as MAXPS: y when either is NaN
NIBBLE_LANEWISE(Min, x < y ? x : y)
#undef NIBBLE_LANEWISE

// a · b + c, rounded once.
inline Vec Fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return a;
}
inline Vec RoundEven(Vec a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
// a < b ? yes : no, per lane; no when either is NaN.
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return a;
}
inline IVec Bits(Vec a) { return std::bit_cast<IVec>(a); }
inline Vec FromBits(IVec a) { return std::bit_cast<Vec>(a); }
// To nearest even; INT32_MIN for NaN and what does not fit, as CVTPS2DQ.
inline IVec ToInt(Vec a) {
  IVec r;
  for (int i = 0; i < kLanes; ++i) {
    const bool fits = a.v[i] >= -0x1p31f && a.v[i] < 0x1p31f;
    r.v[i] = fits ? static_cast<int32_t>(std::nearbyint(a.v[i])) : std::numeric_limits<int32_t>::min();
  }
  return r;
}
inline Vec ToFloat(IVec a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}

// The one order in which sixteen lanes are added: lane i with i + 8, then + 4, + 2, + 1.
inline float ReduceAdd(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}
inline float ReduceMax(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  }
  return a.v[0];
}

// out[i] lane j = the 32-bit word i of the row at `rows + j * stride_bytes`.
inline void TransposeWords(const uint8_t* rows, int64_t stride_bytes, IVec out[kLanes]) {
  for (int j = 0; j < kLanes; ++j) {
    for (int i = 0; i < kLanes; ++i) std::memcpy(&out[i].v[j], rows + j * stride_bytes + i * 4, 4);
  }
}

}  // namespace nibble::NIBBLE_ISA
