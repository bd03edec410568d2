// Random weights and activations in logical order, made on the device, and the slow and simple product that the kernel
// is checked against.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/ops.h"

namespace nibble::cuda::bench {

__host__ __device__ inline uint32_t Hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x ^ x >> 33);
}
// About N(0, 1): the sum of four bytes.
__host__ __device__ inline float Normal(uint32_t h) {
  const int sum = static_cast<int>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24));
  return static_cast<float>(sum - 510) / 147.8f;
}

// Scales and minima: most as a Gaussian weight gets them, one group in 32 anything legal (m + 15 · s2 <= 127).
static __global__ void FillGroups(uint8_t* scale, int8_t* minimum, int64_t count, uint64_t seed) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t h = Hash((seed + 77) * 0xD1B54A32D192ED03ull + i);
  if (h >> 24 < 8) {
    scale[i] = 1 + (h & 15);
    const int most = min(119, 127 - 15 * scale[i]);
    minimum[i] = static_cast<int8_t>(-119 + static_cast<int>((h >> 8) % static_cast<uint32_t>(most + 120)));
  } else {
    scale[i] = 8 + (h & 1);
    minimum[i] = static_cast<int8_t>(-(15 * scale[i]) / 2 - 8 + static_cast<int>(h >> 8 & 15));
  }
}

// Codes nearest to N(0, 28) weights in units of w8.
static __global__ void FillCodes(uint8_t* qweight, const uint8_t* scale, const int8_t* minimum, int64_t n, int64_t k,
                                 uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n * k / 2; i += stride) {
    const int64_t group = i / (kBlock / 2);
    uint32_t byte = 0;
    for (int half = 0; half < 2; ++half) {
      const float w = 28.0f * Normal(Hash(seed * 0x9E3779B97F4A7C15ull + 2 * i + half));
      const int code = static_cast<int>(rintf((w - minimum[group]) / scale[group]));
      byte |= static_cast<uint32_t>(min(15, max(0, code))) << (4 * half);
    }
    qweight[i] = static_cast<uint8_t>(byte);
  }
}

// N(0, 32) codes with outliers at the ends of the range; with `four_bits`, seven blocks of 128 in eight are 4-bit ones of
// a shared exponent, as in most models' inputs (their products take less power).
static __global__ void FillActivations(int8_t* x, int64_t count, uint64_t seed, bool four_bits) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint32_t h = Hash(seed * 31 + i);
    int v = static_cast<int>(rintf(32.0f * Normal(h)));
    if ((h & 1023) == 7) v = (h >> 10 & 1) != 0 ? 127 : -127;
    v = min(127, max(-127, v));
    if (four_bits && i / kBlock % 8 != 7) {
      const int exponent = 3 + static_cast<int>(Hash(seed + i / kBlock) & 1);
      v = min(7, max(-7, __float2int_rn(ldexpf(static_cast<float>(v), -exponent)))) * (1 << exponent);
    }
    x[i] = static_cast<int8_t>(v);
  }
}

static __global__ void SumRows(const int8_t* x, int32_t* sums, int64_t k) {
  __shared__ int32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int32_t sum = 0;
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) sum += x[blockIdx.x * k + i];
  atomicAdd(&total, sum);
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

static __global__ void FillScales(float* to, int64_t count, uint64_t seed) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) to[i] = 0.0005f + static_cast<float>(Hash(seed * 17 + i) % 10000) * 1e-6f;
}

// w8 [N, K].
static __global__ void Unpack(const uint8_t* qweight, const uint8_t* scale, const int8_t* minimum, int8_t* w8, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int code = qweight[i / 2] >> (i % 2 * 4) & 15;
    w8[i] = static_cast<int8_t>(code * scale[i / kBlock] + minimum[i / kBlock]);
  }
}

// y[t, n] in bf16, 64 × 64 outputs per block of 256 threads; N a multiple of 64.
static __global__ void Reference(const int8_t* x, const int8_t* w8, const float* token_scale, const float* channel_scale,
                                 __nv_bfloat16* y, int64_t rows, int64_t n, int64_t k) {
  __shared__ int32_t a[64][17], b[64][17];
  const int64_t n0 = int64_t{blockIdx.x} * 64, t0 = int64_t{blockIdx.y} * 64;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int32_t sums[4][4] = {};
  for (int64_t at = 0; at < k; at += 64) {
    for (int i = threadIdx.x; i < 1024; i += 256) {
      const int r = i / 16, c = i % 16;
      a[r][c] = t0 + r < rows ? *reinterpret_cast<const int32_t*>(x + (t0 + r) * k + at + c * 4) : 0;
      b[r][c] = *reinterpret_cast<const int32_t*>(w8 + (n0 + r) * k + at + c * 4);
    }
    __syncthreads();
    for (int c = 0; c < 16; ++c) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) sums[i][j] = __dp4a(a[ty * 4 + i][c], b[tx + 16 * j][c], sums[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t t = t0 + ty * 4 + i, channel = n0 + tx + 16 * j;
      if (t >= rows) continue;
      const float scale = __fmul_rn(token_scale[t], channel_scale[channel]);
      y[t * n + channel] = __float2bfloat16_rn(__fmul_rn(static_cast<float>(sums[i][j]), scale));
    }
  }
}

// Counts elements that differ and keeps the place of one.
static __global__ void Compare(const uint16_t* got, const uint16_t* want, int64_t count, unsigned long long* wrong) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    if (got[i] != want[i] && atomicAdd(wrong, 1ull) == 0) wrong[1] = i;
  }
}

static __global__ void Poison(uint16_t* to, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) to[i] = 0x7fc1;
}

}  // namespace nibble::cuda::bench
