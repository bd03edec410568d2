// Rows of bf16 whose channels stay where they are: every thread keeps its part in registers between the pass that finds
// a row's scale and the pass that codes it. A row is one thread block's, or cut into slices of whole blocks of 128 for
// the blocks of a cluster, which tell each other sums and maxima through their shared memory.
#pragma once

#include "kernels/cuda/ptx/cluster.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/shared.h"
#include "kernels/cuda/rows/unit.cuh"

namespace nibble::cuda {

#if __CUDA_ARCH__ >= 900
// What the blocks of a cluster need of each other. Every block holds all of a row's sums and maxima.
inline constexpr int kMostSlices = 8;
struct SliceCluster {
  __device__ __forceinline__ SliceCluster() : rank(ClusterRank()), size(ClusterSize()) { ClusterArriveRelaxed(); }

  // Lane i of kLanes that hold the same value writes it to block i, and so on.
  template <int kLanes>
  __device__ __forceinline__ void Tell(const uint32_t* shared, uint32_t value, int lane) const {
#pragma unroll
    for (int to = lane; to < kMostSlices; to += kLanes) {
      if (to < size) StoreCluster32(ClusterAddress(SharedAddress(shared), static_cast<uint32_t>(to)), value);
    }
  }
  __device__ __forceinline__ void AddToFirst(const int* shared, int value) const {
    AddCluster32(ClusterAddress(SharedAddress(shared), 0), static_cast<uint32_t>(value));
  }
  __device__ __forceinline__ void WaitForStart() const { ClusterWait(); }
  __device__ __forceinline__ void Sync() const { ClusterSync(); }
  // Only the first block waits: the others may end, nobody reads their memory any more.
  __device__ __forceinline__ void Finish() const {
    ClusterArrive();
    if (rank == 0) ClusterWait();
  }

  int rank, size;
};
#endif

// The only block of its row.
struct WholeRow {
  template <int kLanes>
  __device__ __forceinline__ void Tell(uint32_t* shared, uint32_t value, int lane) const {
    if (lane == 0) *shared = value;
  }
  __device__ __forceinline__ void AddToFirst(int* shared, int value) const { atomicAdd(shared, value); }
  __device__ __forceinline__ void WaitForStart() const {}
  __device__ __forceinline__ void Sync() const { __syncthreads(); }
  __device__ __forceinline__ void Finish() const { __syncthreads(); }

  static constexpr int rank = 0, size = 1;
};

// A thread takes one unit. Grid: the slices of row 0, of row 1, ...
template <typename Source, int kOctets, typename Blocks>
__device__ __forceinline__ void CodeSlice(const Blocks& blocks_of_row, const Source& source, const RowCoding& coding,
                                          int k) {
  using Unit = Unit<Source, kOctets>;
  extern __shared__ __align__(8) Maxima maxima[];  // of every warp of the row; then squares of every block of the row
  __shared__ CodeTable table;
  __shared__ RowResult result;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, row_warps = blocks_of_row.size * warps;
  uint32_t* const squares = reinterpret_cast<uint32_t*>(maxima + row_warps);
  const int blocks = k / kBlockChannels;
  // Whole warps of two octets a thread, which a Hadamard transform may need whole.
  constexpr int kWarpBlocks = 4;
  const int together = blocks_of_row.size * kWarpBlocks;
  const int slice_blocks = (blocks + together - 1) / together * kWarpBlocks;
  const int first = blocks_of_row.rank * slice_blocks;
  const int block = first + static_cast<int>(threadIdx.x) / Unit::kThreads;
  const int column = block * kBlockChannels + static_cast<int>(threadIdx.x) % Unit::kThreads * kOctet;
  const bool has = block < min(first + slice_blocks, blocks);
  const int64_t row = static_cast<int64_t>(blockIdx.x / blocks_of_row.size);

  // The next kernel may come at once where every multiprocessor is busy for long; a short one would have to share them.
  if (kOctets > 2) GridDependencyLaunch();
  Unit unit;
  if (has) unit.bits = coding.block_bits[block];
  if constexpr (Source::kNorm) {
    // Where a thread has much to do its weights come first, else they come when they are needed.
    constexpr bool kEarlyWeights = kOctets > 2;
    uint4 weights[kOctets];
    const auto weights_of = [&](int o) { return source.FetchWeights(column + o * Unit::kStep); };
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      if (kEarlyWeights && has) weights[o] = weights_of(o);
    }
    GridDependencyWait();
    const typename Source::RowView view = source.View(row);
    typename Source::Fetched fetched[kOctets];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      if (has) fetched[o] = source.Fetch(view, column + o * Unit::kStep);
    }
    unit.Take(has, column, source, view, [&](int o) { return fetched[o]; },
              [&](int o) { return kEarlyWeights ? weights[o] : weights_of(o); });
  } else {
    GridDependencyWait();
    const typename Source::RowView view = source.View(row);
    unit.Take(has, column, source, view, [&](int o) { return source.Fetch(view, column + o * Unit::kStep); },
              NoWeights{});
  }
  Maxima most;
  most.Add(unit.magnitude, unit.bits);
  most.OfWarp();
  blocks_of_row.WaitForStart();
  if (Source::kNorm && has) {
    blocks_of_row.template Tell<Unit::kThreads>(squares + block, __float_as_uint(unit.squares), lane % Unit::kThreads);
  }
  Maxima* const of_warp = maxima + blocks_of_row.rank * warps + warp;
  blocks_of_row.template Tell<32>(&of_warp->wide, most.wide, lane);
  blocks_of_row.template Tell<32>(&of_warp->narrow, most.narrow, lane);
  if (threadIdx.x == 0) result.code_sum = 0;
  blocks_of_row.Sync();
  if (kOctets <= 2) GridDependencyLaunch();
  if (warp == 0) FindScale(source, squares, blocks, maxima, row_warps, &result);
  __syncthreads();

  const RowScale scale = result.scale;
  const UnitPlace place = {coding, row, k, column};
  int sum;
  if (Unit::kF32 || scale.plain || scale.scale == 0.0f) {
    sum = unit.Code(has, result.multiplier, scale, place);
  } else if constexpr (!Unit::kF32) {
    const bool by_table = __syncthreads_or(unit.bits == 4);
    if (by_table) {
      FillTable(table, scale);
      __syncthreads();
    }
    const TableBlock table_block(__uint_as_float(unit.magnitude), scale);
    sum = unit.CodeByTable(has, table_block, scale, by_table, table, place);
  }
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) blocks_of_row.AddToFirst(&result.code_sum, sum);
  blocks_of_row.Finish();
  if (blocks_of_row.rank != 0 || threadIdx.x != 0) return;
  coding.scales[row] = scale.scale;
  if (coding.code_sums != nullptr) coding.code_sums[row] = result.code_sum;
}

template <typename Source, int kOctets>
__global__ void __maxnreg__(64) CodeRowSlices(const Source source, const RowCoding coding, const int k) {
  CodeSlice<Source, kOctets>(WholeRow{}, source, coding, k);
}
template <typename Source, int kOctets>
__global__ void __maxnreg__(64) CodeClusterSlices(const Source source, const RowCoding coding, const int k) {
#if __CUDA_ARCH__ >= 900
  CodeSlice<Source, kOctets>(SliceCluster{}, source, coding, k);
#endif
}

}  // namespace nibble::cuda
