// Codes of bf16 rows by a table. What a 4-bit block makes of a magnitude depends on the row's scale and on the block's
// exponent, and the latter only moves a bf16 by whole binades: so one table per row, over the few hundred bf16 between
// half the scale and fourteen times it, holds both candidates' codes and the difference of their squared errors.
#pragma once

#include "kernels/cuda/rows/code.cuh"

namespace nibble::cuda {

// Entry j is about the bf16 j steps above the largest one that is at most scale / 2; 14 · scale is less than 640 steps
// above. Bits 0 to 25: the finer error minus the coarser, signed, in units of 2^-15; a thread adds 16 entries, at most
// 784 in all, and what is above does not disturb that. Bits 26 to 28 and 29 to 31: magnitudes of the finer and of the
// coarser code.
inline constexpr int kTableEntries = 640;
inline constexpr int kDifferenceBits = 26;
inline constexpr float kTableUnit = 32768.0f;
using CodeTable = uint32_t[kTableEntries];
// A block's sum, in these units, is off by less than this: 128 roundings, and what the specification's f32 sums are off
// by where they are nearly equal.
inline constexpr int kTableDoubt = 80;

__device__ __forceinline__ uint32_t TableFloor(float scale) { return (__float_as_uint(scale) >> 16) - 128; }

__device__ __forceinline__ uint32_t TableEntry(int j, const RowScale& row) {
  const float x = __uint_as_float((TableFloor(row.scale) + static_cast<uint32_t>(j)) << 16);
  const float v = Quotient(x, row.scale, row.inverse);
  const float fine = fminf(v, 7.0f) + kRoundToInteger, coarse = __fmaf_rn(v, 0.5f, kRoundToInteger);
  const float fine_difference = v - (fine - kRoundToInteger);
  const float coarse_difference = __fmaf_rn(-2.0f, coarse - kRoundToInteger, v);
  const float difference = fine_difference * fine_difference - coarse_difference * coarse_difference;
  return (static_cast<uint32_t>(__float2int_rn(difference * kTableUnit)) & ((1u << kDifferenceBits) - 1)) |
         (__float_as_uint(fine) & 7) << 26 | __float_as_uint(coarse) << 29;
}

// All threads of a block; the caller's barrier follows.
__device__ __forceinline__ void FillTable(CodeTable& table, const RowScale& row) {
  for (int j = static_cast<int>(threadIdx.x); j < kTableEntries; j += static_cast<int>(blockDim.x)) {
    table[j] = TableEntry(j, row);
  }
}

// Gives four bytes of at most 127 the signs of four bf16.
__device__ __forceinline__ uint32_t WithSigns(uint32_t magnitudes, uint32_t low_pair, uint32_t high_pair) {
  uint32_t negative;  // a byte of sign bits each
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(negative) : "r"(low_pair), "r"(high_pair));
  const uint32_t minus = (0x80808080u - magnitudes) ^ 0x80808080u;
  return (minus & negative) | (magnitudes & ~negative);
}

// What the table needs to know of a 4-bit block: its coarser exponent, and its place: minus the bf16 of entry 0.
struct TableBlock {
  __device__ __forceinline__ TableBlock(float amax, const RowScale& row)
      : TableBlock(0) {
    const int coarse = CoarseExponent(Quotient(amax, row.scale, row.inverse));
    const uint32_t floor = TableFloor(row.scale) + static_cast<uint32_t>(max(coarse - 1, 0)) * 128;
    packed = static_cast<uint32_t>(coarse) << 16 | ((0u - floor) & 0xffff);
  }
  __device__ __forceinline__ explicit TableBlock(uint32_t packed) : packed(packed) {}
  __device__ __forceinline__ int Coarse() const { return static_cast<int>(packed >> 16); }
  __device__ __forceinline__ uint32_t MinusFloor() const { return __byte_perm(packed, 0, 0x1010); }  // twice 16 bits

  uint32_t packed;
};

// Whether the finer candidate of a block has the smaller squared error: what CodeBlock compares.
template <int kOctets>
__device__ __forceinline__ bool FinerIsBetter(const uint4 (&octets)[kOctets], int fine, const RowScale& row) {
  const float unit = row.scale * PowerOfTwo(fine), inverse = row.inverse * PowerOfTwo(-fine);
  float finer[kOctets] = {}, coarser[kOctets] = {};
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    float x[kOctet];
    Unpack(octets[o], x);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float v = Quotient(x[i], unit, inverse);
      const float fine_code = fminf(fmaxf(v, -7.0f), 7.0f) + kRoundToInteger - kRoundToInteger;
      const float coarse_code = __fmaf_rn(v, 0.5f, kRoundToInteger) - kRoundToInteger;
      const float fine_difference = v - fine_code, coarse_difference = __fmaf_rn(-2.0f, coarse_code, v);
      finer[o] = __fmaf_rn(fine_difference, fine_difference, finer[o]);
      coarser[o] = __fmaf_rn(coarse_difference, coarse_difference, coarser[o]);
    }
  }
  constexpr int kThreads = kBlockOctets / kOctets;
  return TreeSum<kThreads>(TreeSumOfOctets(finer)) < TreeSum<kThreads>(TreeSumOfOctets(coarser));
}

// 4-bit blocks of bf16, each spread over 16 / kOctets neighbouring threads of a warp, all of whose threads call this
// together; those that hold no such block (narrow is false) for the others' sake. Not for a plain row. Fills packed
// codes, returns the exponent.
template <int kOctets>
__device__ __forceinline__ int CodeNarrowBlock(bool narrow, const uint4 (&x)[kOctets], const TableBlock& block,
                                               const RowScale& row, const CodeTable& table, uint2 (&codes)[kOctets]) {
  static_assert(kOctets <= 2);  // or sums overflow
  const int coarse = block.Coarse(), fine = max(coarse - 1, 0);
  uint32_t both[2 * kOctets];  // bytes: two bits of the difference, three of the finer code, three of the coarser
  uint32_t sum = 0;
  if (narrow) {
    const uint32_t minus_floor = block.MinusFloor();
    const auto entries = [&](uint32_t pair, uint32_t* low, uint32_t* high) {
      uint32_t bytes;  // offsets in the table; hidden from the compiler, which would shift each of them by itself
      asm("shl.b32 %0, %1, 2;" : "=r"(bytes) : "r"(__viaddmax_s16x2(pair & 0x7fff7fffu, minus_floor, 0)));
      const char* const from = reinterpret_cast<const char*>(table);
      *low = *reinterpret_cast<const uint32_t*>(from + (bytes & 0xffff));
      *high = *reinterpret_cast<const uint32_t*>(from + (bytes >> 16));
    };
    const auto four = [&](uint32_t low_pair, uint32_t high_pair) {
      uint32_t a, b, c, d;
      entries(low_pair, &a, &b);
      entries(high_pair, &c, &d);
      sum += a + b;
      sum += c + d;
      return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410);
    };
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      both[2 * o] = four(x[o].x, x[o].y);
      both[2 * o + 1] = four(x[o].z, x[o].w);
    }
  }
  int difference = static_cast<int>(sum << (32 - kDifferenceBits)) >> (32 - kDifferenceBits);
#pragma unroll
  for (int distance = kBlockOctets / kOctets / 2; distance > 0; distance /= 2) {
    difference += __shfl_xor_sync(~0u, difference, distance);
  }
  const bool doubtful = narrow && coarse != 0 && abs(difference) < kTableDoubt;
  bool finer = difference < 0 || coarse == 0;
  if (__any_sync(~0u, doubtful)) {
    const bool better = FinerIsBetter(x, fine, row);
    if (doubtful) finer = better;
  }
  if (!narrow) return 0;
  const int exponent = finer ? fine : coarse, drop = finer ? 2 : 5;
  const auto signed_codes = [&](uint32_t candidates, uint32_t low_pair, uint32_t high_pair) {
    return WithSigns((candidates >> drop & 0x07070707u) << exponent, low_pair, high_pair);
  };
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    codes[o] = make_uint2(signed_codes(both[2 * o], x[o].x, x[o].y), signed_codes(both[2 * o + 1], x[o].z, x[o].w));
  }
  return exponent;
}

}  // namespace nibble::cuda
