// Orthonormal block-Hadamard transform of a row in shared memory: butterflies of distance 1, 2, 4, ..., as the
// specification has them, then one product with 1/sqrt(size). An octet's three stages are its thread's own; distances 8
// to 64 are one pass over shared memory, inside the blocks of 128, and up to four from 128 on are another each.
#pragma once

#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

// Shared memory is padded so that neither octets nor the strides of a pass meet in few banks: eight floats per block.
inline constexpr int kPadFloats = 8;
__device__ __forceinline__ int Padded(int channel) { return channel + channel / kBlockChannels * kPadFloats; }

template <int kStages>
__device__ __forceinline__ void Butterfly(float (&x)[1 << kStages], int stage) {
#pragma unroll
  for (int i = 0; i < 1 << kStages; ++i) {
    if ((i >> stage & 1) != 0) continue;
    const float a = x[i], b = x[i + (1 << stage)];
    x[i] = a + b;
    x[i + (1 << stage)] = a - b;
  }
}

// The stages of distance 1, 2 and 4.
__device__ __forceinline__ void OctetButterflies(float (&x)[kOctet], int size) {
  Butterfly<3>(x, 0);
  if (size > 2) Butterfly<3>(x, 1);
  if (size > 4) Butterfly<3>(x, 2);
}

// Stages of distance, 2 · distance, ...: all below 128, or all from 128 on. The last pass (kLast) has the product.
template <int kStages, bool kLast>
__device__ __forceinline__ void HadamardPass(float* x, int k, int distance, float factor) {
  const int stride = distance < kBlockChannels ? distance : Padded(distance);
  for (int item = static_cast<int>(threadIdx.x); item < k >> kStages; item += static_cast<int>(blockDim.x)) {
    float* const at = x + Padded(((item & ~(distance - 1)) << kStages) + (item & (distance - 1)));
    float v[1 << kStages];
#pragma unroll
    for (int i = 0; i < 1 << kStages; ++i) v[i] = at[i * stride];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) Butterfly<kStages>(v, stage);
#pragma unroll
    for (int i = 0; i < 1 << kStages; ++i) at[i * stride] = kLast ? v[i] * factor : v[i];
  }
}

// What is left after the octets' stages, and the product. Barriers between the passes and after the last; the caller's
// is before the first.
__device__ __forceinline__ void FinishHadamard(float* x, int k, int size) {
  const float scale = __frcp_rn(__fsqrt_rn(static_cast<float>(size)));
  int distance = min(size, kOctet);
  do {
    const int stages = min(4, 31 - __clz(size / distance));
    if (distance << stages != size) {  // four stages, and more to come
      HadamardPass<4, false>(x, k, distance, scale);
    } else {
      switch (stages) {
        case 0: HadamardPass<0, true>(x, k, 1, scale); break;
        case 1: HadamardPass<1, true>(x, k, distance, scale); break;
        case 2: HadamardPass<2, true>(x, k, distance, scale); break;
        case 3: HadamardPass<3, true>(x, k, distance, scale); break;
        default: HadamardPass<4, true>(x, k, distance, scale); break;
      }
    }
    distance <<= stages;
    __syncthreads();
  } while (distance < size);
}

// The transform of rows that lie in registers: 512 channels in a warp, whose lane 8 b + q holds octets q and q + 8 of the
// b-th block of 128. Distances inside an octet and of 64 are the lane's own, the others between lanes.
inline constexpr int kMostWarpHadamard = 512;
__device__ __forceinline__ void WarpHadamard(float (&x)[2][kOctet], int size) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto between_lanes = [&](int distance) {
    const float sign = (lane & distance) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[o][i] = __fmaf_rn(x[o][i], sign, __shfl_xor_sync(~0u, x[o][i], distance));
    }
  };
  OctetButterflies(x[0], size);
  OctetButterflies(x[1], size);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    if (size > distance * kOctet) between_lanes(distance);
  }
  if (size > kBlockChannels / 2) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float a = x[0][i], b = x[1][i];
      x[0][i] = a + b;
      x[1][i] = a - b;
    }
  }
#pragma unroll
  for (int distance = 8; distance < 32; distance *= 2) {
    if (size > distance * kBlockOctets) between_lanes(distance);
  }
  const float scale = __frcp_rn(__fsqrt_rn(static_cast<float>(size)));
#pragma unroll
  for (int o = 0; o < 2; ++o) {
#pragma unroll
    for (float& value : x[o]) value *= scale;
  }
}

}  // namespace nibble::cuda
