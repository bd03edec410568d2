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
struct RowScale {
  float scale, inverse;
  bool plain;
};
__device__ __forceinline__ RowScale MakeRowScale(float scale) {
  return {scale, __frcp_rn(scale), !(scale > 0x1p-60f && scale < 0x1p60f)};
}

// One block, spread over 16 / kOctets neighbouring threads of a warp (named by mask): this thread holds `kOctets`
// octets, 16 / kOctets apart. amax: the block's largest magnitude. Fills packed codes, returns the exponent.
//
// Adding 1.5 · 2^23 rounds to the nearest even integer and leaves it in the low byte. In a 4-bit block, values are
// divided by scale · 2^(e-1), the unit of the finer candidate, so both squared errors are exact multiples of the
// specification's and compare alike.
template <int kOctets, bool kPlain>
__device__ __forceinline__ int CodeBlockBy(uint32_t mask, const float (&x)[kOctets][kOctet], float amax, int bits,
                                         const RowScale& row, uint2 (&codes)[kOctets]) {
  constexpr float kRound = 12582912.0f;
  const auto pack = [](const float (&rounded)[kOctet]) {
    const auto four = [&](int i) {
      const uint32_t low = __byte_perm(__float_as_uint(rounded[i]), __float_as_uint(rounded[i + 1]), 0x0040);
      const uint32_t high = __byte_perm(__float_as_uint(rounded[i + 2]), __float_as_uint(rounded[i + 3]), 0x0040);
      return __byte_perm(low, high, 0x5410);
    };
    return make_uint2(four(0), four(4));
  };
  // x / (scale · 2^shift); NaN becomes -limit, as in the specification's clamp.
  const auto divide = [&](float value, float unit, float inverse, float power, float limit) {
    if constexpr (kPlain) {
      const float u = __fdiv_rn(value, row.scale) * power;
      return u == u ? u : -limit;
    }
    const float quotient = value * inverse;
    return __fmaf_rn(__fmaf_rn(-quotient, unit, value), inverse, quotient);
  };

  if (bits == 8) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float rounded[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        float u = divide(x[o][i], row.scale, row.inverse, 1.0f, 127.0f);
        if constexpr (kPlain) u = fminf(fmaxf(u, -127.0f), 127.0f);
        rounded[i] = u + kRound;
      }
      codes[o] = pack(rounded);
    }
    return 0;
  }

  const float u_max = __fdiv_rn(amax, row.scale);
  const int coarse = (u_max > 7.0f) + (u_max > 14.0f) + (u_max > 28.0f) + (u_max > 56.0f);
  const int fine = max(coarse - 1, 0);
  const float power = __int_as_float((127 - fine) << 23);  // 2^-fine
  const float inverse = row.inverse * power, unit = row.scale * __int_as_float((127 + fine) << 23);
  uint2 fine_codes[kOctets], coarse_codes[kOctets];
  float fine_error[kOctets], coarse_error[kOctets];
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    float fine_rounded[kOctet], coarse_rounded[kOctet];
    fine_error[o] = coarse_error[o] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float v = divide(x[o][i], unit, inverse, power, 7.0f);
      fine_rounded[i] = fminf(fmaxf(v, -7.0f), 7.0f) + kRound;
      const float fine_difference = v - (fine_rounded[i] - kRound);
      fine_error[o] = __fmaf_rn(fine_difference, fine_difference, fine_error[o]);
      // |v| <= 14 up to a rounding, so the coarser candidate saturates by itself.
      float half = v * 0.5f;
      if constexpr (kPlain) half = fminf(fmaxf(half, -7.0f), 7.0f);
      coarse_rounded[i] = half + kRound;
      const float coarse_difference = __fmaf_rn(-2.0f, coarse_rounded[i] - kRound, v);
      coarse_error[o] = __fmaf_rn(coarse_difference, coarse_difference, coarse_error[o]);
    }
    fine_codes[o] = pack(fine_rounded);
    coarse_codes[o] = pack(coarse_rounded);
  }
  // The tree's first steps are between octets of this thread.
#pragma unroll
  for (int distance = kOctets / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int o = 0; o < distance; ++o) {
      fine_error[o] += fine_error[o + distance];
      coarse_error[o] += coarse_error[o + distance];
    }
  }
  constexpr int kThreads = kBlockOctets / kOctets;
  const bool finer = TreeSum<kThreads>(mask, fine_error[0]) < TreeSum<kThreads>(mask, coarse_error[0]) || coarse == 0;
  const int exponent = finer ? fine : coarse;
  const uint32_t kept = (0xffu >> exponent) * 0x01010101u;  // bits of a byte that the shift does not push out of it
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    const uint2 chosen = finer ? fine_codes[o] : coarse_codes[o];
    codes[o] = make_uint2((chosen.x & kept) << exponent, (chosen.y & kept) << exponent);
  }
  return exponent;
}

template <int kOctets>
__device__ __forceinline__ int CodeBlock(uint32_t mask, const float (&x)[kOctets][kOctet], float amax, int bits,
                                         const RowScale& row, uint2 (&codes)[kOctets]) {
  return row.plain ? CodeBlockBy<kOctets, true>(mask, x, amax, bits, row, codes)
                   : CodeBlockBy<kOctets, false>(mask, x, amax, bits, row, codes);
}

__device__ __forceinline__ int SumOfCodes(uint2 codes) {
  return __dp4a(static_cast<int>(codes.x), 0x01010101, __dp4a(static_cast<int>(codes.y), 0x01010101, 0));
}

}  // namespace nibble::cuda
