#include "kernels/cuda/gemm_sm80/layout.h"

#include "kernels/cuda/device.h"

namespace nibble::cuda::sm80 {
namespace {

constexpr int kLanesPerGroup = 4;  // threads that share the 64 bytes of one row and block

__global__ void WeightLayout(W4View from, int64_t first_row, WeightTarget to) {
  const int64_t groups = from.k / kDepthBlock, depth = MinimaDepth(to.four_bit_blocks);
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = index / (groups * kLanesPerGroup);
  if (row >= from.n) return;
  const int64_t in_row = index - row * groups * kLanesPerGroup;
  const int64_t group = in_row / kLanesPerGroup;
  const int part = static_cast<int>(in_row % kLanesPerGroup);
  const int64_t to_row = first_row + row, step = to.steps[group];
  uint8_t* block = to.blocks + (to_row / kTileRows * groups + step) * kWeightBlockBytes;
  const int in_block = static_cast<int>(to_row % kTileRows);
  *reinterpret_cast<uint4*>(block + in_block * 64 + part * 16) =
      *reinterpret_cast<const uint4*>(from.qweight + row * (from.k / 2) + group * 64 + part * 16);
  if (part == 0) {
    const int8_t minimum = from.group_min[row * groups + group];
    block[kCodeBytes + 2 * in_block] = from.group_scale[row * groups + group];
    block[kCodeBytes + 2 * in_block + 1] = static_cast<uint8_t>(minimum + 128);
    if (step < to.four_bit_blocks) to.minima[to_row * depth + step] = minimum;
  }
}

}  // namespace

void LaunchWeightLayout(cudaStream_t stream, const W4View& rows, int64_t first_row, const WeightTarget& to) {
  const int64_t threads = rows.n * (rows.k / kDepthBlock) * kLanesPerGroup;
  const unsigned grid = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  WeightLayout<<<grid, kThreads, 0, stream>>>(rows, first_row, to);
  NIBBLE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nibble::cuda::sm80
