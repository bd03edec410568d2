// What the blocks of 128 channels tell the row, and what the row tells all of its threads.
#pragma once

#include "kernels/cuda/rows/code.cuh"
#include "kernels/cuda/rows/source.cuh"

namespace nibble::cuda {

struct BlockState {
  float squares;    // Σ x² of a norm's input
  uint32_t magnitude;  // bits of the largest, before the row's multiplier
  int bits;         // 4 or 8
};

struct RowResult {
  float multiplier;
  RowScale scale;
  int code_sum;
  bool any_narrow;  // a block of 4 bits
};

// The first warp finds a row's multiplier. Sixteen lanes, lane b % 16 adds block b, then the tree.
template <typename Source>
__device__ __forceinline__ float MultiplierOf(const Source& source, const BlockState* states, int blocks) {
  if constexpr (!Source::kNorm) return 1.0f;
  if constexpr (Source::kNorm) {
    float squares = 0.0f;
    for (int b = static_cast<int>(threadIdx.x) % kBlockOctets; b < blocks; b += kBlockOctets) {
      squares += states[b].squares;
    }
    return source.Multiplier(TreeSum<kBlockOctets>(squares));
  }
}

// The scale of a row from the largest magnitudes of its 8-bit and of its 4-bit blocks.
__device__ __forceinline__ RowScale ScaleOfMaxima(uint32_t wide, uint32_t narrow, float multiplier) {
  // Rounding is monotonic, so two divisions find the largest of the blocks' quotients.
  return MakeRowScale(MaxMagnitude(__fdiv_rn(__uint_as_float(wide) * multiplier, 127.0f),
                                   __fdiv_rn(__uint_as_float(narrow) * multiplier, 112.0f)));
}

// The first warp finds a row's scale.
__device__ __forceinline__ RowScale ScaleOfRow(const BlockState* states, int blocks, float multiplier) {
  uint32_t wide = 0, narrow = 0;
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += 32) {
    uint32_t& most = states[b].bits == 8 ? wide : narrow;
    most = max(most, states[b].magnitude);
  }
  return ScaleOfMaxima(__reduce_max_sync(~0u, wide), __reduce_max_sync(~0u, narrow), multiplier);
}

// Adds up the threads' sums of codes and writes what there is one of per row. All threads; `sum` is zero before.
__device__ __forceinline__ void FinishRow(const RowCoding& coding, int64_t row, float scale, int thread_sum,
                                          int* sum) {
  thread_sum = __reduce_add_sync(~0u, thread_sum);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, thread_sum);
  __syncthreads();
  if (threadIdx.x != 0) return;
  coding.scales[row] = scale;
  if (coding.code_sums != nullptr) coding.code_sums[row] = *sum;
}

}  // namespace nibble::cuda
