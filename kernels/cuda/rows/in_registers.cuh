// Rows of bf16 that stay in registers between the pass that finds their scale and the pass that codes them.
#pragma once

#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/code.cuh"
#include "kernels/cuda/rows/plan.h"
#include "kernels/cuda/rows/source.cuh"

namespace nibble::cuda {

// What a block of 128 channels tells the row. `magnitude` is negative for a 4-bit block.
struct BlockState {
  float squares;
  float magnitude;
};
struct RowState {
  float squares, max_wide, max_narrow;
};

// Every warp reads all blocks: sixteen lanes, lane b % 16 takes block b, then the tree.
__device__ __forceinline__ RowState ReduceBlocks(const BlockState* states, int blocks) {
  RowState row = {};
  for (int b = static_cast<int>(threadIdx.x) % kBlockOctets; b < blocks; b += kBlockOctets) {
    const BlockState state = states[b];
    row.squares += state.squares;
    float& max = signbit(state.magnitude) ? row.max_narrow : row.max_wide;
    max = MaxMagnitude(max, state.magnitude);
  }
  row.squares = TreeSum<kBlockOctets>(~0u, row.squares);
  row.max_wide = TreeMaxMagnitude<kBlockOctets>(~0u, row.max_wide);
  row.max_narrow = TreeMaxMagnitude<kBlockOctets>(~0u, row.max_narrow);
  return row;
}

// Eight neighbouring threads take a block: thread q its octets q and q + 8, so that their sum is the tree's first step
// and a warp reads and writes whole 128-byte lines. Grid: one block per output row.
template <typename Source, int kUnits>
__global__ void __launch_bounds__(512) CodeRowsInRegisters(const Source source, const RowCoding coding, const int k) {
  constexpr int kHalf = kBlockChannels / 2, kThreads = kBlockOctets / 2;
  extern __shared__ BlockState states[];
  __shared__ int code_sum;
  const int blocks = k / kBlockChannels;
  const uint32_t mask = LaneMask<kThreads>();
  const auto block_of = [&](int m) {
    return static_cast<int>(threadIdx.x / kThreads + m * (blockDim.x / kThreads));
  };
  const auto column_of = [&](int m) {
    return block_of(m) * kBlockChannels + static_cast<int>(threadIdx.x % kThreads) * kOctet;
  };

  GridDependencyLaunch();
  int bits[kUnits];
  uint4 weight[kUnits][2];
#pragma unroll
  for (int m = 0; m < kUnits; ++m) {
    if (block_of(m) >= blocks) continue;
    bits[m] = coding.block_bits[block_of(m)];
    if constexpr (Source::kNorm) {
      weight[m][0] = *reinterpret_cast<const uint4*>(source.weight + column_of(m));
      weight[m][1] = *reinterpret_cast<const uint4*>(source.weight + column_of(m) + kHalf);
    }
  }
  if (threadIdx.x == 0) code_sum = 0;
  GridDependencyWait();

  const int64_t row = blockIdx.x;
  int64_t source_row = row;
  if constexpr (Source::kNorm) source_row = source.Row(row);
  typename Source::Fetched fetched[kUnits][2];
#pragma unroll
  for (int m = 0; m < kUnits; ++m) {
    if (block_of(m) >= blocks) continue;
    fetched[m][0] = source.Fetch(source_row, column_of(m));
    fetched[m][1] = source.Fetch(source_row, column_of(m) + kHalf);
  }
  uint4 packed[kUnits][2];
  float magnitude[kUnits];
  // The values to code, but for the row's multiplier.
  const auto value = [&](int m, int half, float x[kOctet]) {
    Unpack(packed[m][half], x);
    if constexpr (Source::kNorm) {
      float w[kOctet];
      Unpack(weight[m][half], w);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] *= w[i];
    }
  };
#pragma unroll
  for (int m = 0; m < kUnits; ++m) {
    if (block_of(m) >= blocks) continue;
    float squares[2], x[kOctet];
    magnitude[m] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      packed[m][half] = source.Finish(fetched[m][half], source_row, column_of(m) + half * kHalf);
      if constexpr (Source::kNorm) {
        Unpack(packed[m][half], x);
        squares[half] = SquareChain(x);
      }
      value(m, half, x);
      magnitude[m] = MaxMagnitude(magnitude[m], MaxMagnitude(x));
    }
    magnitude[m] = TreeMaxMagnitude<kThreads>(mask, magnitude[m]);
    BlockState state = {0.0f, bits[m] == 8 ? magnitude[m] : -magnitude[m]};
    if constexpr (Source::kNorm) state.squares = TreeSum<kThreads>(mask, squares[0] + squares[1]);
    if (threadIdx.x % kThreads == 0) states[block_of(m)] = state;
  }
  __syncthreads();

  const RowState state = ReduceBlocks(states, blocks);
  float multiplier = 1.0f;
  if constexpr (Source::kNorm) multiplier = source.Multiplier(state.squares);
  const RowScale scale = MakeRowScale(ScaleOf(state.max_wide * multiplier, state.max_narrow * multiplier));
  int sum = 0;
#pragma unroll
  for (int m = 0; m < kUnits; ++m) {
    if (block_of(m) >= blocks) continue;
    uint2 codes[2] = {};
    int exponent = 0;
    if (scale.scale != 0.0f) {
      float x[2][kOctet];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        value(m, half, x[half]);
        if constexpr (Source::kNorm) {
#pragma unroll
          for (int i = 0; i < kOctet; ++i) x[half][i] *= multiplier;
        }
      }
      const float amax = magnitude[m] * multiplier;
      exponent = scale.plain ? CodeBlock<2, true>(mask, x, amax, bits[m], scale, codes)
                             : CodeBlock<2, false>(mask, x, amax, bits[m], scale, codes);
    }
    int8_t* to = coding.codes + row * k + column_of(m);
    *reinterpret_cast<uint2*>(to) = codes[0];
    *reinterpret_cast<uint2*>(to + kHalf) = codes[1];
    sum += SumOfCodes(codes[0]) + SumOfCodes(codes[1]);
    if (coding.exponents != nullptr && threadIdx.x % kThreads == 0) {
      coding.exponents[row * blocks + block_of(m)] = static_cast<uint8_t>(exponent);
    }
  }
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x % 32 == 0) atomicAdd(&code_sum, sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    coding.scales[row] = scale.scale;
    if (coding.code_sums != nullptr) coding.code_sums[row] = code_sum;
  }
}

}  // namespace nibble::cuda
