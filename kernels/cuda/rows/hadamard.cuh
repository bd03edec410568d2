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

// Stages of distance, 2 · distance, ...: all below 128, or all from 128 on.
template <int kStages>
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
    for (int i = 0; i < 1 << kStages; ++i) at[i * stride] = v[i] * factor;
  }
}

// What is left after the octets' stages, and the product. Barriers between the passes and after the last; the caller's
// is before the first.
__device__ __forceinline__ void FinishHadamard(float* x, int k, int size) {
  const float scale = __frcp_rn(__fsqrt_rn(static_cast<float>(size)));
  int distance = min(size, kOctet);
  do {
    const int stages = min(4, 31 - __clz(size / distance));
    const float factor = distance << stages == size ? scale : 1.0f;
    switch (stages) {
      case 0: HadamardPass<0>(x, k, 1, factor); break;
      case 1: HadamardPass<1>(x, k, distance, factor); break;
      case 2: HadamardPass<2>(x, k, distance, factor); break;
      case 3: HadamardPass<3>(x, k, distance, factor); break;
      default: HadamardPass<4>(x, k, distance, factor); break;
    }
    distance <<= stages;
    __syncthreads();
  } while (distance < size);
}

}  // namespace nibble::cuda
