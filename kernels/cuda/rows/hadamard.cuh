// Orthonormal block-Hadamard transform of a row in shared memory: butterflies of distance 1, 2, 4, ..., as the
// specification has them, then one product with 1/sqrt(size). An octet's first three stages are its thread's own; the
// others pass over shared memory, up to four stages at a time.
#pragma once

#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

// Shared memory is padded so that neither octets nor the strides of a pass meet in few banks: eight floats per block.
inline constexpr int kPadFloats = 8;
__device__ __forceinline__ int Padded(int channel) { return channel + channel / kBlockChannels * kPadFloats; }

template <int kStages>
__device__ __forceinline__ void Butterflies(float (&x)[1 << kStages], int stages = kStages) {
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s >= stages) break;
#pragma unroll
    for (int i = 0; i < 1 << kStages; ++i) {
      if ((i >> s & 1) != 0) continue;
      const float a = x[i], b = x[i + (1 << s)];
      x[i] = a + b;
      x[i + (1 << s)] = a - b;
    }
  }
}

template <int kStages>
__device__ __forceinline__ void HadamardPass(float* x, int k, int distance, float factor) {
  for (int item = static_cast<int>(threadIdx.x); item < k >> kStages; item += static_cast<int>(blockDim.x)) {
    const int base = ((item & ~(distance - 1)) << kStages) + (item & (distance - 1));
    float v[1 << kStages];
#pragma unroll
    for (int i = 0; i < 1 << kStages; ++i) v[i] = x[Padded(base + i * distance)];
    Butterflies<kStages>(v);
#pragma unroll
    for (int i = 0; i < 1 << kStages; ++i) x[Padded(base + i * distance)] = v[i] * factor;
  }
}

// Stages that the octet's own thread takes.
__device__ __forceinline__ int OctetStages(int size) { return min(3, 31 - __clz(size)); }

// The stages past the octets' own and the product. Barriers before and after every pass.
__device__ __forceinline__ void FinishHadamard(float* x, int k, int size) {
  const float scale = __frcp_rn(__fsqrt_rn(static_cast<float>(size)));
  int left = 31 - __clz(size) - OctetStages(size);
  int distance = 1 << OctetStages(size);
  do {
    const int passes = (left + 3) / 4;
    const int stages = passes == 0 ? 0 : (left + passes - 1) / passes;
    left -= stages;
    const float factor = left == 0 ? scale : 1.0f;
    __syncthreads();
    switch (stages) {
      case 0: HadamardPass<0>(x, k, 1, factor); break;
      case 1: HadamardPass<1>(x, k, distance, factor); break;
      case 2: HadamardPass<2>(x, k, distance, factor); break;
      case 3: HadamardPass<3>(x, k, distance, factor); break;
      default: HadamardPass<4>(x, k, distance, factor); break;
    }
    distance <<= stages;
  } while (left > 0);
  __syncthreads();
}

}  // namespace nibble::cuda
