// Eight neighbouring channels of a row: what a thread loads, stores and sums at a time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/ops.h"

namespace nibble::cuda {

inline constexpr int kOctet = 8;
inline constexpr int kBlockChannels = static_cast<int>(kBlock);
inline constexpr int kBlockOctets = kBlockChannels / kOctet;

__device__ __forceinline__ float LowBF16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float HighBF16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ void Unpack(const uint4& packed, float x[kOctet]) {
  x[0] = LowBF16(packed.x), x[1] = HighBF16(packed.x), x[2] = LowBF16(packed.y), x[3] = HighBF16(packed.y);
  x[4] = LowBF16(packed.z), x[5] = HighBF16(packed.z), x[6] = LowBF16(packed.w), x[7] = HighBF16(packed.w);
}
__device__ __forceinline__ uint4 Pack(const float x[kOctet]) {
  return make_uint4(PackBF16(x[0], x[1]), PackBF16(x[2], x[3]), PackBF16(x[4], x[5]), PackBF16(x[6], x[7]));
}

// A row of either type whose octets may lie anywhere. `whole`: every octet is complete and 16-byte aligned.
struct RowSpan {
  void* data;  // of the row's first column
  DType dtype;
  bool whole;
};
__host__ __device__ __forceinline__ void* RowPointer(const Rows& rows, int64_t row, int64_t column = 0) {
  return static_cast<uint8_t*>(rows.data) + (row * rows.cols + column) * (rows.dtype == DType::kBF16 ? 2 : 4);
}
__device__ __forceinline__ RowSpan RowAt(const Rows& rows, int64_t row, int64_t column, bool whole) {
  return {RowPointer(rows, row, column), rows.dtype, whole};
}

// Columns [begin, begin + 8) as f32, zeros from `end` on.
__device__ __forceinline__ void LoadOctet(const RowSpan& row, int begin, int end, float x[kOctet]) {
  if (row.dtype == DType::kBF16) {
    const uint16_t* from = static_cast<const uint16_t*>(row.data) + begin;
    if (row.whole && begin < end) return Unpack(*reinterpret_cast<const uint4*>(from), x);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = begin + i < end ? LowBF16(from[i]) : 0.0f;
    return;
  }
  const float* from = static_cast<const float*>(row.data) + begin;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = begin + i < end ? from[i] : 0.0f;
}

// Rounds to the row's type and stores; x becomes what was stored.
__device__ __forceinline__ void StoreOctet(const RowSpan& row, int begin, int end, float x[kOctet]) {
  if (row.dtype == DType::kF32) {
    float* to = static_cast<float*>(row.data) + begin;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (begin + i < end) to[i] = x[i];
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(row.data) + begin;
  const uint4 packed = Pack(x);
  Unpack(packed, x);
  if (row.whole) {
    if (begin < end) *reinterpret_cast<uint4*>(to) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (begin + i < end) to[i] = static_cast<uint16_t>(__float_as_uint(x[i]) >> 16);
  }
}

// Largest magnitude; NaN if any is (the specification compares magnitudes as integers).
__device__ __forceinline__ float MaxMagnitude(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(fabsf(a)), "f"(fabsf(b)));
  return m;
}
__device__ __forceinline__ float MaxMagnitude(const float x[kOctet]) {
  float m = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < kOctet; ++i) m = MaxMagnitude(m, x[i]);
  return m;
}

// The same of octets of bf16: magnitudes of two, compared as integers of 16 bits, are in order, and NaN is the largest.
template <int kOctets>
__device__ __forceinline__ float MaxMagnitude(const uint4 (&octets)[kOctets]) {
  uint32_t most = 0;
#pragma unroll
  for (const uint4& octet : octets) {
    most = __vimax3_u16x2(most, octet.x & 0x7fff7fffu, octet.y & 0x7fff7fffu);
    most = __vimax3_u16x2(most, octet.z & 0x7fff7fffu, octet.w & 0x7fff7fffu);
  }
  return LowBF16(max(most & 0xffff, most >> 16));
}

// One lane's part of Σ x² of a block: its octet in order, from zero.
__device__ __forceinline__ float SquareChain(const float x[kOctet]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) sum = __fmaf_rn(x[i], x[i], sum);
  return sum;
}

// The sixteen lanes of a block's sum, or those of them that are left, joined by the specification's tree: i + 8, + 4,
// + 2, + 1. The lanes are `kLanes` neighbouring threads; every one gets the result. All threads of a warp together.
template <int kLanes>
__device__ __forceinline__ float TreeSum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}
// Its first steps, between kOctets lanes that one thread holds.
template <int kOctets>
__device__ __forceinline__ float TreeSumOfOctets(const float (&lanes)[kOctets]) {
  float x[kOctets];
#pragma unroll
  for (int o = 0; o < kOctets; ++o) x[o] = lanes[o];
#pragma unroll
  for (int distance = kOctets / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int o = 0; o < distance; ++o) x[o] += x[o + distance];
  }
  return x[0];
}
template <int kLanes>
__device__ __forceinline__ uint32_t TreeMax(uint32_t x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

}  // namespace nibble::cuda
