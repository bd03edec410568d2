// What a block's copying warps do: weights, activations and others' sums into the ring of steps.
#pragma once

#include "kernels/cuda/gemm_w4ax/block.cuh"
#include "kernels/cuda/ptx/bulk_copy.h"
#include "kernels/cuda/ptx/flag.h"
#include "kernels/cuda/ptx/tma.h"

namespace nibble::cuda::gemm {

template <int kIndex>
struct CopyingBlock : Block<kIndex> {
  using B = Block<kIndex>;
  using B::Block;
  using B::kConfig, B::kTokens, B::kMulticasts, B::base, B::p, B::rank, B::worker;
  using B::ActivationsEmpty, B::ArrivalsOf, B::Begin, B::End, B::FirstBlock, B::Full, B::Opens, B::PartialsOf, B::SumsLeft;
  using B::SumSteps, B::WeightsEmpty;
  using typename B::ActivationRing, typename B::WeightRing;

  __device__ __forceinline__ void CopyWeights() const {
    const uint64_t policy = p.weights_once ? L2EvictFirst() : L2EvictNormal();
    Schedule schedule(p.split, worker);
    WorkItem item;
    WeightRing at;
    bool first_round = true;
    while (schedule.Next(p.split, worker, &item)) {
      const int end = End(item);
      const int first_block = kMulticasts ? FirstBlock(item, 0) : 0;
      const int blocks = kMulticasts ? FirstBlock(item, kConsumers) - first_block : item.blocks;
      for (int step = Begin(item); step < end; ++step) {
        if (!first_round) MbarrierWait(WeightsEmpty(at.stage), at.parity ^ 1);
        const uint32_t to = base + kConfig.weights_at() + at.stage * kConfig.weight_bytes();
        const uint32_t barrier = Full(at.stage);
        const int first = (item.row_block + first_block) * p.depth_blocks + step * kConfig.depth_blocks();
        const uint8_t* from = p.weights + int64_t{first} * kW4AxBlockBytes;
        if constexpr (kConfig.shares_depth) {
          MbarrierArriveExpect(barrier, kConfig.weight_bytes());
          BulkCopy(to, from, kConfig.weight_bytes(), barrier, policy);
        } else {
          MbarrierArriveExpect(barrier, blocks * kW4AxBlockBytes);
#pragma unroll
          for (int i = 0; i < kConfig.step_blocks(); ++i) {
            if (i >= blocks) break;
            BulkCopy(to + i * kW4AxBlockBytes, from + int64_t{i} * p.depth_blocks * kW4AxBlockBytes, kW4AxBlockBytes,
                     barrier, policy);
          }
        }
        at.Advance();
        if (at.stage == 0) first_round = false;
      }
      for (int i = SumSteps(item); i > 0; --i) {
        if (!first_round) MbarrierWait(WeightsEmpty(at.stage), at.parity ^ 1);
        MbarrierArrive(Full(at.stage));
        at.Advance();
        if (at.stage == 0) first_round = false;
      }
    }
  }

  __device__ __forceinline__ void CopyActivations(const CUtensorMap* map) const {
    Schedule schedule(p.split, worker);
    WorkItem item;
    WeightRing at;  // whose barrier announces the step
    ActivationRing slot;
    bool first_round = true;
    while (schedule.Next(p.split, worker, &item)) {
      const int end = End(item);
      for (int step = Begin(item); step < end; ++step) {
        if (!first_round) MbarrierWait(ActivationsEmpty(slot.stage), slot.parity ^ 1);
        const uint32_t to = base + slot.stage * kConfig.activation_bytes();
        const uint32_t barrier = Full(at.stage);
        // Rows of a slot past the tile's tokens keep what they had: their sums are not stored.
        const int token = item.token_tile * p.split.tile_tokens, box = BoxTokens(kMulticasts, p.split.tile_tokens);
        if constexpr (kMulticasts) {
          MbarrierArriveExpect(barrier, 2 * box * kDepthBlock);
          TmaMulticast2D(to + rank * box * kDepthBlock, map, step * kDepthBlock, token + rank * box, barrier, 3);
        } else {
          MbarrierArriveExpect(barrier, kConfig.depth_blocks() * box * kDepthBlock);
#pragma unroll
          for (int i = 0; i < kConfig.depth_blocks(); ++i) {
            TmaLoad2D(to + i * kTokens * kDepthBlock, map, (step * kConfig.depth_blocks() + i) * kDepthBlock, token,
                      barrier);
          }
        }
        at.Advance();
        slot.Advance();
        if (slot.stage == 0) first_round = false;
      }
      int sum_steps = SumSteps(item);
      if (sum_steps == 0) continue;
      while (LoadAcquire(ArrivalsOf(worker)) * kConfig.chunks() != sum_steps) {
      }
      *ArrivalsOf(worker) = 0;
      FenceGlobalBeforeCopy();
      const int4* from = PartialsOf(worker + 1);
      for (; sum_steps > 0; --sum_steps, from += kConfig.chunk_bytes() / 16) {
        if (!first_round) MbarrierWait(ActivationsEmpty(slot.stage), slot.parity ^ 1);
        MbarrierArriveExpect(Full(at.stage), kConfig.chunk_bytes());
        BulkCopy(base + slot.stage * kConfig.activation_bytes(), from, kConfig.chunk_bytes(), Full(at.stage));
        at.Advance();
        slot.Advance();
        if (slot.stage == 0) first_round = false;
      }
    }
  }

  // Says that this block's sums of a tile that another worker opened are there, so that no multiplying warp waits for
  // its own stores.
  __device__ __forceinline__ void AnnounceSums() const {
    Schedule schedule(p.split, worker);
    WorkItem item;
    while (schedule.Next(p.split, worker, &item) && item.stream >= 0) {
      if (Opens(item)) continue;
      MbarrierWait(SumsLeft(), 0);
      ReduceAddRelease(ArrivalsOf(p.split.parts.Of(item.stream * p.split.steps)), 1);
      return;
    }
  }
};

}  // namespace nibble::cuda::gemm
