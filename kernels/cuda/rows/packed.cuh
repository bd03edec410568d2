// Rows of bf16 whose channels stay where they are: packed in shared memory between the pass that finds a row's scale
// and the pass that codes it, every thread reading back only what it wrote.
#pragma once

#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/row_state.cuh"

namespace nibble::cuda {

// Eight neighbouring threads take a block of 128: thread q its octets q and q + 8 (a unit), so that their sum is the
// tree's first step and a warp reads and writes whole 128-byte lines. Grid: one block per output row.
template <typename Source>
__global__ void __maxnreg__(Source::kRegisters) CodePackedRows(const Source source, const RowCoding coding, const int k) {
  constexpr int kHalf = kBlockChannels / 2, kThreads = kBlockOctets / 2;
  extern __shared__ __align__(16) uint4 row_packed[];
  __shared__ RowResult result;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int blocks = k / kBlockChannels, units = blocks * kThreads;
  BlockState* const states = reinterpret_cast<BlockState*>(row_packed + 2 * units);
  const uint32_t mask = LaneMask<kThreads>();
  const auto column_of = [](int unit) { return unit / kThreads * kBlockChannels + unit % kThreads * kOctet; };

  GridDependencyLaunch();
  GridDependencyWait();
  const int64_t row = blockIdx.x;
  int64_t source_row = row;
  if constexpr (Source::kNorm) source_row = source.Row(row);
  for (int unit = thread; unit < units; unit += threads) {
    const int column = column_of(unit);
    const auto first = source.Fetch(source_row, column), second = source.Fetch(source_row, column + kHalf);
    const uint4 packed[2] = {source.Finish(first, source_row, column),
                             source.Finish(second, source_row, column + kHalf)};
    row_packed[unit] = packed[0];
    row_packed[units + unit] = packed[1];
    BlockState state = {.bits = coding.block_bits[unit / kThreads]};
    if constexpr (Source::kNorm) {
      float x[kOctet], y[kOctet];
      Unpack(packed[0], x);
      Unpack(packed[1], y);
      state.squares = TreeSum<kThreads>(mask, SquareChain(x) + SquareChain(y));
      source.Weigh(column, x);
      source.Weigh(column + kHalf, y);
      state.magnitude = MaxMagnitude(MaxMagnitude(x), MaxMagnitude(y));
    } else {
      state.magnitude = MaxMagnitude(packed);
    }
    state.magnitude = TreeMaxMagnitude<kThreads>(mask, state.magnitude);
    if (unit % kThreads == 0) states[unit / kThreads] = state;
  }
  __syncthreads();
  if (thread < 32) {
    const float multiplier = MultiplierOf(source, states, blocks);
    const RowScale scale = ScaleOfRow(states, blocks, multiplier);
    if (thread == 0) result = {multiplier, scale, 0};
  }
  __syncthreads();

  const float multiplier = result.multiplier;
  const RowScale scale = result.scale;
  int sum = 0;
  for (int unit = thread; unit < units; unit += threads) {
    const int column = column_of(unit), block = unit / kThreads;
    uint2 codes[2] = {};
    int exponent = 0;
    if (scale.scale != 0.0f) {
      float x[2][kOctet];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Unpack(row_packed[half * units + unit], x[half]);
        if constexpr (Source::kNorm) {
          source.Weigh(column + half * kHalf, x[half]);
#pragma unroll
          for (int i = 0; i < kOctet; ++i) x[half][i] *= multiplier;
        }
      }
      const BlockState& state = states[block];
      exponent = CodeBlock<2>(mask, x, state.magnitude * multiplier, state.bits, scale, codes);
    }
    int8_t* to = coding.codes + row * k + column;
    *reinterpret_cast<uint2*>(to) = codes[0];
    *reinterpret_cast<uint2*>(to + kHalf) = codes[1];
    sum += SumOfCodes(codes[0]) + SumOfCodes(codes[1]);
    if (coding.exponents != nullptr && unit % kThreads == 0) {
      coding.exponents[row * blocks + block] = static_cast<uint8_t>(exponent);
    }
  }
  FinishRow(coding, row, scale.scale, sum, &result.code_sum);
}

}  // namespace nibble::cuda
