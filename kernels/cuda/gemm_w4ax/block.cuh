// What all warps of a W4Ax thread block share: its place in the work, its barriers, and where things lie. What its warps
// do are two layers on top of it, copying.cuh and multiplying.cuh; the kernel makes one object of them.
#pragma once

#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/ptx/cluster.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda::gemm {

// A place in a ring of kStages steps, with the parity of its current round.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t Previous() const { return (stage == 0 ? kStages : stage) - 1; }
};

template <int kIndex>
struct Block {
  static constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  static constexpr int kTokens = kConfig.tokens;
  static constexpr int kMultiplying = 128 * kConsumers;  // threads
  static constexpr bool kMulticasts = kConfig.multicasts;
  static constexpr int kWeightStages = kConfig.weight_stages;
  static constexpr int kActivationStages = kConfig.activation_stages;
  using WeightRing = RingPosition<kWeightStages>;
  using ActivationRing = RingPosition<kActivationStages>;

  const GemmParams& p;
  uint8_t* shared;
  uint32_t base;  // its shared address
  uint32_t rank;  // in the cluster
  int worker;

  __device__ __forceinline__ Block(const GemmParams& params, uint8_t* memory) : p(params), shared(memory) {
    // Opaque, or the compiler computes it again, in a cluster by way of a special register, wherever it is used.
    asm volatile("mov.u32 %0, %1;" : "=r"(base) : "r"(SharedAddress(memory)));
    rank = kConfig.cluster > 1 ? ClusterRank() : 0;
    worker = blockIdx.x / kConfig.cluster;
  }

  // Barriers. A step's weights and activations are there; both warpgroups have read its weights; have multiplied by its
  // activations. A peer's sums are in the exchange buffer; the peer has taken this block's.
  __device__ __forceinline__ uint32_t Full(uint32_t stage) const { return base + kConfig.barriers_at() + 8 * stage; }
  __device__ __forceinline__ uint32_t WeightsEmpty(uint32_t stage) const { return Full(kWeightStages + stage); }
  __device__ __forceinline__ uint32_t ActivationsEmpty(uint32_t slot) const { return Full(2 * kWeightStages + slot); }
  __device__ __forceinline__ uint32_t SumFull() const { return Full(2 * kWeightStages + kActivationStages); }
  __device__ __forceinline__ uint32_t SumEmpty() const { return SumFull() + 8; }
  // This block has left its sums of the tile that another worker opened.
  __device__ __forceinline__ uint32_t SumsLeft() const { return SumFull() + 16; }

  __device__ __forceinline__ void InitBarriers() const {
    for (int i = 0; i < kWeightStages; ++i) {
      MbarrierInit(Full(i), 2);  // the two copying warps
      MbarrierInit(WeightsEmpty(i), kMultiplying);
    }
    for (int i = 0; i < kActivationStages; ++i) MbarrierInit(ActivationsEmpty(i), kMulticasts ? 2 * 4 * kConsumers : kMultiplying);
    MbarrierInit(SumFull(), kConfig.halves_depth() ? 1 : 128);
    MbarrierInit(SumEmpty(), kConfig.halves_depth() ? 4 : 128);
    MbarrierInit(SumsLeft(), 128 * kConfig.sum_warpgroups());
    MbarrierInitFence();
  }

  // This block's part of an item's steps.
  __device__ __forceinline__ int Begin(const WorkItem& item) const {
    return !kConfig.halves_depth() || rank == 0 ? item.begin : item.begin + (item.end - item.begin) / 2;
  }
  __device__ __forceinline__ int End(const WorkItem& item) const {
    return !kConfig.halves_depth() || rank == 1 ? item.end : item.begin + (item.end - item.begin) / 2;
  }

  // Where the rows of warpgroup `warpgroup` of this block begin among an item's row blocks.
  __device__ __forceinline__ int FirstBlock(const WorkItem& item, int warpgroup) const {
    constexpr int kParts = kConfig.row_parts();
    const int part = (kMulticasts ? rank * kConsumers : 0) + warpgroup, longer = item.blocks % kParts;
    return part * (item.blocks / kParts) + (part < longer ? part : longer);
  }

  // The workers that share an item's tile are neighbours. The first opens the tile, has it at the end of its part and adds
  // up the sums; the others have it at the start of theirs, so that their sums are there as a rule. It waits for workers
  // of a higher number only, and blocks start in order. A worker opens one shared tile at most, so its number names the
  // tile, and continues one at most.
  static __device__ __forceinline__ bool Opens(const WorkItem& item) { return item.begin == 0; }
  // How many others an opener waits for.
  __device__ __forceinline__ int Others(const WorkItem& item) const {
    if (!kConfig.streams() || !Opens(item) || item.end == p.split.steps) return 0;
    return p.split.parts.Of((item.stream + 1) * p.split.steps - 1) - worker;
  }
  // Steps of the ring that bring others' sums, after those of the item.
  __device__ __forceinline__ int SumSteps(const WorkItem& item) const { return Others(item) * kConfig.chunks(); }
  // What this block, or the same one of another cluster, leaves as worker `owner`, which lies before what the next worker
  // leaves: [chunks][warpgroups with sums][chunk_sums / 4][128 threads] int4.
  __device__ __forceinline__ int4* PartialsOf(int owner) const {
    return reinterpret_cast<int4*>(p.partials) +
           (static_cast<int>(rank) * p.split.workers + owner) * (kConfig.chunks() * kConfig.chunk_bytes() / 16);
  }
  // How many workers have left sums of the tile that `opener` opens.
  __device__ __forceinline__ int32_t* ArrivalsOf(int opener) const {
    return p.arrivals + opener * kGemmArrivalsPerWorker + rank;
  }
};

}  // namespace nibble::cuda::gemm
