// Rows that a block takes alone, too many or too long to be held in registers: they wait for their scale in shared
// memory, as bf16 or, after a Hadamard transform, as f32. A thread reads back only what it wrote.
#pragma once

#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/unit.cuh"

namespace nibble::cuda {

template <typename Source>
__global__ void __maxnreg__(Source::kHadamard ? 72 : 64)
    CodePackedRows(const Source source, const RowCoding coding, const int k) {
  constexpr int kOctets = 2;
  using Unit = Unit<Source, kOctets>;
  extern __shared__ __align__(16) uint4 row_octets[];
  __shared__ CodeTable table;
  __shared__ RowResult result;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
  const int blocks = k / kBlockChannels, groups = threads / Unit::kThreads, q = thread % Unit::kThreads;
  const int first = thread / Unit::kThreads, column = first * kBlockChannels + q * kOctet;
  const int whole = (blocks + groups - 1) / groups * groups;  // loops that exchange values run with whole warps
  // Of every block, first its largest magnitude, then its place in the table; the sign bit says that it has 8 bits.
  constexpr uint32_t kWide = 0x80000000;
  constexpr int kPlanes = Unit::kF32 ? 2 : 1;  // of 16 bytes of every octet
  uint32_t* const states = reinterpret_cast<uint32_t*>(row_octets + kPlanes * blocks * kBlockOctets);
  const auto octet_at = [&](int block, int o, int plane) -> uint4& {
    return row_octets[(plane * blocks + block) * kBlockOctets + q + o * Unit::kThreads];
  };
  const int64_t row = blockIdx.x;

  GridDependencyLaunch();
  for (int b = thread; b < blocks; b += threads) states[b] = coding.block_bits[b] == 8 ? kWide : 0;
  if (thread == 0) result.code_sum = 0;
  __syncthreads();
  GridDependencyWait();
  Unit unit;
  typename Source::RowView from = source.View(row) + column;
#pragma unroll 1
  for (int block = first; block < whole; block += groups) {
    const bool has = block < blocks;
    unit.Take(has, 0, source, from, [&](int o) { return source.Fetch(from, o * Unit::kStep); }, NoWeights{});
    if (has) {
      if (q == 0) states[block] |= unit.magnitude;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const uint4* const words = reinterpret_cast<const uint4*>(&unit.octets[o]);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) octet_at(block, o, plane) = words[plane];
      }
    }
    from += groups * kBlockChannels;
  }
  __syncthreads();
  if (thread < 32) {
    Maxima most;
    bool narrow = false;
#pragma unroll 4
    for (int b = lane; b < blocks; b += 32) {
      const uint32_t state = states[b];
      most.Add(state & ~kWide, (state & kWide) != 0 ? 8 : 4);
      narrow |= (state & kWide) == 0;
    }
    most.OfWarp();
    narrow = __any_sync(~0u, narrow);
    if (lane == 0) {
      result.scale = ScaleOfMaxima(most.wide, most.narrow, 1.0f);
      result.any_narrow = narrow;
    }
  }
  __syncthreads();

  const RowScale scale = result.scale;
  const bool from_magnitudes = Unit::kF32 || scale.plain || scale.scale == 0.0f;
  const bool by_table = !from_magnitudes && result.any_narrow;
  if (by_table) {
    FillTable(table, scale);
    for (int b = thread; b < blocks; b += threads) {
      if ((states[b] & kWide) == 0) states[b] = TableBlock(__uint_as_float(states[b]), scale).packed;
    }
    __syncthreads();
  }
  int sum = 0;
  // Calls code(has, state, place) with every unit in turn.
  const auto each_unit = [&](const auto& code) {
#pragma unroll 1
    for (int block = first; block < whole; block += groups) {
      const bool has = block < blocks;
      uint32_t state = kWide;
      if (has) {
        state = states[block];
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          uint4* const words = reinterpret_cast<uint4*>(&unit.octets[o]);
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) words[plane] = octet_at(block, o, plane);
        }
      }
      unit.bits = (state & kWide) != 0 ? 8 : 4;
      sum += code(has, state, UnitPlace{coding, row, k, block * kBlockChannels + q * kOctet});
    }
  };
  if (from_magnitudes) {
    each_unit([&](bool has, uint32_t state, const UnitPlace& place) {
      unit.magnitude = state & ~kWide;
      return unit.Code(has, 1.0f, scale, place);
    });
  } else if constexpr (!Unit::kF32) {
    each_unit([&](bool has, uint32_t state, const UnitPlace& place) {
      return unit.CodeByTable(has, TableBlock(state), scale, by_table, table, place);
    });
  }
  FinishRow(coding, row, scale.scale, sum, &result.code_sum);
}

}  // namespace nibble::cuda
