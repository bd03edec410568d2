// How the quantizer's kernels divide their work: by items, by a warp or by a block for each row.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace nibble::cuda {

inline constexpr int kThreads = 256;

inline unsigned Blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

__device__ __forceinline__ int64_t Item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Warp per row.
template <typename... Parameters, typename... Arguments>
void LaunchRows(cudaStream_t stream, int64_t rows, int threads, int64_t shared_bytes, void (*kernel)(Parameters...),
                Arguments... arguments) {
  if (shared_bytes > 0) {
    NIBBLE_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<Blocks(rows, threads / 32), threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  NIBBLE_CUDA_CHECK(cudaGetLastError());
}

// Block per row.
template <typename... Parameters, typename... Arguments>
void LaunchBlocks(cudaStream_t stream, int64_t blocks, void (*kernel)(Parameters...), Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
  NIBBLE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nibble::cuda
