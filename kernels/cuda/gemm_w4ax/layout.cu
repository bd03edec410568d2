#include "kernels/cuda/gemm_w4ax/layout.h"

#include "kernels/cuda/device.h"

namespace nibble::cuda {
namespace {

constexpr int kLanesPerGroup = 4;  // threads that share the 64 bytes of one row and depth block

// Four codes of two bytes, one a byte.
__device__ __forceinline__ uint32_t Spread(uint32_t two_bytes) {
  const uint32_t pairs = (two_bytes | two_bytes << 8) & 0x00ff00ffu;
  return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

// A thread moves 16 bytes of a row, 32 codes: the low and high nibbles of four words.
__global__ void Relayout(W4View from, RowPlacement placement, int64_t depth_blocks, uint8_t* blocks) {
  const int64_t groups = from.k / kDepthBlock;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = index / (groups * kLanesPerGroup);
  if (row >= from.n) return;
  const int64_t in_row = index - row * groups * kLanesPerGroup;
  const int64_t group = in_row / kLanesPerGroup;
  const int part = static_cast<int>(in_row % kLanesPerGroup);  // k = 32 · part + 0..31 of the group
  const int64_t to_row = PlacedRow(placement, row);
  uint8_t* block = blocks + (to_row / kRowBlock * depth_blocks + group) * kW4AxBlockBytes;
  const int in_block = static_cast<int>(to_row % kRowBlock);
  const int warp = in_block / 16, upper = in_block / 8 % 2, g = in_block % 8;

  const uint8_t* source = from.qweight + row * (from.k / 2) + group * (kDepthBlock / 2) + part * 16;
  const uint4 codes = *reinterpret_cast<const uint4*>(source);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint32_t low = words[c / 2] >> (16 * (c % 2)) & 0xffff, high = words[2 + c / 2] >> (16 * (c % 2)) & 0xffff;
    const int thread = 32 * warp + 4 * g + c, j = 2 * (part % 2) + upper;
    *reinterpret_cast<uint32_t*>(block + part / 2 * 2048 + thread * 16 + j * 4) = Spread(low) | Spread(high) << 4;
  }
  if (part == 0) {
    uint8_t* scales = block + 4096 + (warp * 8 + g) * 4;
    scales[upper] = from.group_scale[row * groups + group];
    scales[2 + upper] = static_cast<uint8_t>(from.group_min[row * groups + group] + 128);
  }
}

}  // namespace

void LaunchW4AxRelayout(cudaStream_t stream, const W4View& rows, const RowPlacement& placement, uint8_t* blocks) {
  constexpr int kThreads = 256;
  const int64_t threads = rows.n * (rows.k / kDepthBlock) * kLanesPerGroup;
  const unsigned grid = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  Relayout<<<grid, kThreads, 0, stream>>>(rows, placement, W4AxDepthBlocks(rows.k), blocks);
  NIBBLE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nibble::cuda
