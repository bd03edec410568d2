// The sixteen lanes of vec_portable.h in one AVX-512 register. Included by kernels_avx512.cc only, under its target
// pragma.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/base/float16.h"

namespace nibble::NIBBLE_ISA {

inline constexpr int kLanes = 16;

struct IVec {
  __m512i v;

  static IVec Set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static IVec Zero() { return {_mm512_setzero_si512()}; }
  static IVec Iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  static IVec Load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static IVec LoadU8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static IVec LoadI8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void Store(void* p) const { _mm512_storeu_si512(p, v); }
  void StoreI8(int8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
};

inline IVec operator+(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline IVec operator-(IVec a, IVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline IVec operator*(IVec a, IVec b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline IVec operator&(IVec a, IVec b) { return {_mm512_and_si512(a.v, b.v)}; }
inline IVec operator|(IVec a, IVec b) { return {_mm512_or_si512(a.v, b.v)}; }
inline IVec operator^(IVec a, IVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline IVec MulHighU32(IVec a, IVec b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xaaaa, even, odd)};
}
inline IVec Max(IVec a, IVec b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
inline IVec ShiftLeft(IVec a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline IVec ShiftRight(IVec a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline IVec ShiftRightSigned(IVec a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
inline int32_t ReduceAdd(IVec a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t ReduceMax(IVec a) { return _mm512_reduce_max_epi32(a.v); }

struct Vec {
  __m512 v;

  static Vec Set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec Zero() { return {_mm512_setzero_ps()}; }
  static Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec LoadBF16(const BF16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec LoadF16(const F16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }
  // Not VCVTNEPS2BF16: that one flushes subnormals.
  void StoreBF16(BF16* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec RoundEven(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline IVec Bits(Vec a) { return {_mm512_castps_si512(a.v)}; }
inline Vec FromBits(IVec a) { return {_mm512_castsi512_ps(a.v)}; }
inline IVec ToInt(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vec ToFloat(IVec a) { return {_mm512_cvtepi32_ps(a.v)}; }

inline float ReduceAdd(Vec a) {
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float ReduceMax(Vec a) {
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1));
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// 16 x 16 words: pairs of rows, then of pairs, inside 128-bit lanes; then the 4 x 4 lanes themselves.
inline void TransposeWords(const uint8_t* rows, int64_t stride_bytes, IVec out[kLanes]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride_bytes);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 r + c], 128-bit lane l: words 4 l + c of rows 4 r .. 4 r + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    out[c].v = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[4 + c].v = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[8 + c].v = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[12 + c].v = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

}  // namespace nibble::NIBBLE_ISA
