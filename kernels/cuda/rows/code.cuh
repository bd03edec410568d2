// From f32 values to int8 codes with shared exponents (docs/numerics.md), in the bits of kernels/cpu/rows_inl.h.
#pragma once

#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

// Where the codes of a launch go, and how rows are coded; from InputCoding and LinearInput.
struct RowCoding {
  const uint8_t* block_bits;  // [K/128]
  const int32_t* perm;        // [K] or null
  int hadamard;               // 0 or size
  int8_t* codes;              // [T, K]; null: dense
  float* scales;              // [T]
  int32_t* code_sums;         // [T] or null
  uint8_t* exponents;         // [T, K/128] or null
  Rows dense;                 // used iff codes is null
};
inline RowCoding MakeRowCoding(const InputCoding& coding, const LinearInput& out) {
  return {.block_bits = coding.block_bits,
          .perm = coding.perm,
          .hadamard = static_cast<int>(coding.hadamard),
          .codes = coding.quantized ? out.codes : nullptr,
          .scales = out.scales,
          .code_sums = out.code_sums,
          .exponents = out.exponents,
          .dense = out.dense};
}

// Division of a row's values by its scale. With r = 1/s rounded, x·r corrected by one residual is the correctly rounded
// quotient (Markstein, IBM J. Res. Dev. 34, 1990) as long as nothing under- or overflows. Scales so small or large that
// something might, infinite ones and NaN take the plain way, where values may also exceed what a code can hold.
//
// A bf16 needs two operations, x · inverse + x · rest with the first product exact: that is the quotient too, but for
// eleven pairs of mantissas (all pairs were tried). In one of them, of the scale that is nearest to the next power of
// two, it matters to a code; that scale is plain.
struct RowScale {
  float scale, inverse, rest;
  bool plain;
};
__device__ __forceinline__ RowScale MakeRowScale(float scale) {
  const float inverse = __frcp_rn(scale);
  const bool plain = !(scale > 0x1p-60f && scale < 0x1p60f) || (__float_as_uint(scale) & 0x7fffff) == 0x7fffff;
  return {scale, inverse, __fmaf_rn(-scale, inverse, 1.0f) * inverse, plain};
}
__device__ __forceinline__ float Quotient(float x, float divisor, float inverse) {
  const float quotient = x * inverse;
  return __fmaf_rn(__fmaf_rn(-quotient, divisor, x), inverse, quotient);
}

__device__ __forceinline__ float PowerOfTwo(int e) { return __int_as_float((127 + e) << 23); }

// Adding 1.5 · 2^23 rounds to the nearest even integer and leaves it in the low byte.
inline constexpr float kRoundToInteger = 12582912.0f;

// Eight rounded values as packed bytes.
__device__ __forceinline__ uint2 PackRounded(const float (&rounded)[kOctet]) {
  const auto four = [&](int i) {
    const uint32_t low = __byte_perm(__float_as_uint(rounded[i]), __float_as_uint(rounded[i + 1]), 0x0040);
    const uint32_t high = __byte_perm(__float_as_uint(rounded[i + 2]), __float_as_uint(rounded[i + 3]), 0x0040);
    return __byte_perm(low, high, 0x5410);
  };
  return make_uint2(four(0), four(4));
}

// The smallest e with u_max <= 7 · 2^e, at most 4; u_max is a number.
__device__ __forceinline__ int CoarseExponent(float u_max) {
  constexpr int kSeven = 0x40e00000;  // bits of 7.0f: a larger float has larger bits, and 2^23 more where it is doubled
  return min(max((__float_as_int(u_max) - kSeven + 0x7fffff) >> 23, 0), 4);
}

// Blocks of 128, each spread over 16 / kOctets neighbouring threads of a warp, all of whose threads call this together:
// this thread holds `kOctets` octets, 16 / kOctets apart; values(o, x) gives the o-th. amax: the block's largest
// magnitude. Not for a plain row. Fills packed codes, returns the exponent.
//
// In a 4-bit block, values are divided by scale · 2^(e-1), the unit of the finer candidate, so both squared errors are
// exact multiples of the specification's and compare alike.
template <int kOctets, typename Values>
__device__ __forceinline__ int CodeBlock(const Values& values, float amax, int bits, const RowScale& row,
                                         uint2 (&codes)[kOctets]) {
  int coarse = 0, fine = 0;
  uint2 coarse_codes[kOctets];
  float fine_error[kOctets] = {}, coarse_error[kOctets] = {};
  if (bits == 8) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float x[kOctet];
      values(o, x);
#pragma unroll
      for (float& value : x) value = Quotient(value, row.scale, row.inverse) + kRoundToInteger;
      codes[o] = PackRounded(x);
    }
  } else {
    coarse = CoarseExponent(Quotient(amax, row.scale, row.inverse));
    fine = max(coarse - 1, 0);
    const float unit = row.scale * PowerOfTwo(fine), inverse = row.inverse * PowerOfTwo(-fine);
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float x[kOctet], fine_rounded[kOctet], coarse_rounded[kOctet];
      values(o, x);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float v = Quotient(x[i], unit, inverse);
        fine_rounded[i] = fminf(fmaxf(v, -7.0f), 7.0f) + kRoundToInteger;
        const float fine_difference = v - (fine_rounded[i] - kRoundToInteger);
        fine_error[o] = __fmaf_rn(fine_difference, fine_difference, fine_error[o]);
        // |v| <= 14 up to a rounding, so the coarser candidate saturates by itself.
        coarse_rounded[i] = __fmaf_rn(v, 0.5f, kRoundToInteger);
        const float coarse_difference = __fmaf_rn(-2.0f, coarse_rounded[i] - kRoundToInteger, v);
        coarse_error[o] = __fmaf_rn(coarse_difference, coarse_difference, coarse_error[o]);
      }
      codes[o] = PackRounded(fine_rounded);
      coarse_codes[o] = PackRounded(coarse_rounded);
    }
  }
  constexpr int kThreads = kBlockOctets / kOctets;
  const float finer = TreeSum<kThreads>(TreeSumOfOctets(fine_error));
  const float coarser = TreeSum<kThreads>(TreeSumOfOctets(coarse_error));
  if (coarse == 0) return 0;
  const int exponent = finer < coarser ? fine : coarse;
  const uint32_t kept = (0xffu >> exponent) * 0x01010101u;  // bits of a byte that the shift does not push out of it
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    const uint2 chosen = finer < coarser ? codes[o] : coarse_codes[o];
    codes[o] = make_uint2((chosen.x & kept) << exponent, (chosen.y & kept) << exponent);
  }
  return exponent;
}

// The same for a plain row, as the specification reads; take(o, codes) gets the o-th octet's.
template <int kOctets, typename Values, typename Take>
__device__ __forceinline__ int CodePlainBlock(const Values& values, float amax, int bits, const RowScale& row,
                                              const Take& take) {
  // round(x / scale / 2^e) within ±limit; NaN becomes -limit.
  const auto rounded = [](float u, int e, float limit) {
    const float v = u * PowerOfTwo(-e);
    return fminf(fmaxf(v == v ? v : -limit, -limit), limit) + kRoundToInteger;
  };
  const float u_max = __fdiv_rn(amax, row.scale);
  int coarse = 0;  // stays 0 for NaN
  if (bits == 4) coarse = (u_max > 7.0f) + (u_max > 14.0f) + (u_max > 28.0f) + (u_max > 56.0f);
  const int fine = max(coarse - 1, 0);
  float fine_error[kOctets] = {}, coarse_error[kOctets] = {};
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    float x[kOctet];
    values(o, x);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float u = __fdiv_rn(x[i], row.scale);
      const float f = u - (rounded(u, fine, 7.0f) - kRoundToInteger) * PowerOfTwo(fine);
      const float c = u - (rounded(u, coarse, 7.0f) - kRoundToInteger) * PowerOfTwo(coarse);
      fine_error[o] = __fmaf_rn(f, f, fine_error[o]);
      coarse_error[o] = __fmaf_rn(c, c, coarse_error[o]);
    }
  }
  constexpr int kThreads = kBlockOctets / kOctets;
  const float finer = TreeSum<kThreads>(TreeSumOfOctets(fine_error));
  const float coarser = TreeSum<kThreads>(TreeSumOfOctets(coarse_error));
  const int exponent = finer < coarser ? fine : coarse;
  const uint32_t kept = (0xffu >> exponent) * 0x01010101u;
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    float x[kOctet];
    values(o, x);
#pragma unroll
    for (float& value : x) value = rounded(__fdiv_rn(value, row.scale), exponent, bits == 8 ? 127.0f : 7.0f);
    const uint2 codes = PackRounded(x);
    take(o, make_uint2((codes.x & kept) << exponent, (codes.y & kept) << exponent));
  }
  return exponent;
}

// The codes of eight bf16 of an 8-bit block, for a row that is not plain.
__device__ __forceinline__ uint2 CodeWideOctet(const uint4& x, const RowScale& row) {
  float values[kOctet];
  Unpack(x, values);
#pragma unroll
  for (float& value : values) value = __fmaf_rn(value, row.inverse, value * row.rest) + kRoundToInteger;
  return PackRounded(values);
}

__device__ __forceinline__ int SumOfCodes(uint2 codes) {
  return __dp4a(static_cast<int>(codes.x), 0x01010101, __dp4a(static_cast<int>(codes.y), 0x01010101, 0));
}

}  // namespace nibble::cuda
