// What a block's multiplying warpgroups do: weights from the ring through registers, sums to a peer, to another worker or
// to the output.
#pragma once

#include "kernels/cuda/gemm_w4ax/copying.cuh"
#include "kernels/cuda/gemm_w4ax/epilogue.cuh"
#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/wgmma.h"

namespace nibble::cuda::gemm {

template <int kIndex>
struct MultiplyingBlock : CopyingBlock<kIndex> {
  using B = CopyingBlock<kIndex>;
  using B::CopyingBlock;
  using B::kConfig, B::kTokens, B::kMulticasts, B::base, B::p, B::rank, B::shared, B::worker;
  using B::ActivationsEmpty, B::Begin, B::End, B::FirstBlock, B::Full, B::Opens, B::Others, B::PartialsOf, B::SumEmpty;
  using B::SumFull, B::SumsLeft, B::SumSteps, B::WeightsEmpty;
  using typename B::ActivationRing, typename B::WeightRing;

  struct Consumer {
    int warpgroup, thread, warp, lane;
    WeightRing ring;
    ActivationRing slot;
    uint32_t sums_passed = 0;  // through the exchange buffer
  };

  // Gives back a slot of activations, which both blocks of a cluster may fill.
  static __device__ __forceinline__ void ArriveActivations(const Consumer& c, uint32_t barrier) {
    if constexpr (kMulticasts) {
      if (c.lane < 2) MbarrierArriveRemote(barrier, c.lane);
    } else {
      MbarrierArrive(barrier);
    }
  }

  __device__ __forceinline__ Vectors VectorsOf(int warpgroup) const {
    const float* v = reinterpret_cast<const float*>(shared + kConfig.vectors_at()) + warpgroup * kConfig.vector_floats();
    return {v, reinterpret_cast<const int32_t*>(v + kTokens), v + 2 * kTokens,
            v + 2 * kTokens + kConfig.accumulators() * kRowBlock};
  }

  // Starts fetching what the epilogue of an item needs.
  __device__ __forceinline__ void FetchVectors(const Consumer& c, int blocks, int channel, int token, int tokens) const {
    WarpgroupSync(c.warpgroup);  // the previous epilogue has read its own
    const Vectors v = VectorsOf(c.warpgroup);
#pragma unroll
    for (int i = c.thread; i < kTokens; i += 128) {
      const bool valid = i < tokens;
      CopyAsync4(SharedAddress(v.token_scale + i), p.token_scale + (valid ? token + i : 0), valid);
      CopyAsync4(SharedAddress(v.code_sum + i), p.code_sums + (valid ? token + i : 0), valid);
    }
    for (int i = c.thread; i < blocks * kRowBlock; i += 128) {
      const bool valid = channel + i < p.n;
      CopyAsync4(SharedAddress(v.channel_scale + i), p.channel_scale + (valid ? channel + i : 0), valid);
      if (p.bias != nullptr) CopyAsync4(SharedAddress(v.bias + i), p.bias + (valid ? channel + i : 0), valid);
    }
  }

  // Four codes of a weight row, in the low nibbles, as w8 + 128.
  static __device__ __forceinline__ uint32_t Unpack(uint32_t codes, uint32_t scale, uint32_t minimum) {
    return (codes & 0x0f0f0f0fu) * scale + minimum;
  }

  static constexpr bool kSharesDepth = kConfig.shares_depth;

  // A thread's part of a weight block: k 0..63, k 64..127, and the scales and minima (+ 128) of rows g and g + 8.
  struct Codes {
    uint4 low, high;
    uint32_t scales;
  };

  // Sums of kBlocks weight blocks, of as many row blocks or, sharing depth, of one, over this block's steps of the
  // item. Each weight block's four wgmmas run back to back on one accumulator; operand registers are rewritten once the
  // wgmma that reads them, one round before, is done.
  template <int kBlocks, int kSums>
  __device__ __forceinline__ void Multiply(Consumer& c, int steps, int first_block,
                                           int32_t (&sums)[kSums][kTokens / 2]) const {
    const uint32_t weights = base + kConfig.weights_at() + first_block * kW4AxBlockBytes + c.thread * 16;
    uint32_t scales;  // opaque, so that it stays in a register
    asm volatile("mov.u32 %0, %1;"
                 : "=r"(scales)
                 : "r"(weights + 4096 + (c.warp * 8 + (c.lane >> 2)) * 4 - c.thread * 16));
    const uint32_t activations = base + (kSharesDepth ? first_block * kTokens * kDepthBlock : 0);
    uint32_t a[kBlocks][4][4];
    for (int step = 0; step < steps; ++step) {
      MbarrierWait(Full(c.ring.stage), c.ring.parity);
      Codes codes[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t at = c.ring.stage * kConfig.weight_bytes() + b * kW4AxBlockBytes;
        codes[b] = {LoadShared128(weights + at), LoadShared128(weights + at + 2048), LoadShared32(scales + at)};
      }
      __syncwarp();
      const uint32_t descriptor = WgmmaDescriptor(activations + c.slot.stage * kConfig.activation_bytes());
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t word = codes[b].scales;
        const uint32_t scale0 = word & 255, scale1 = __byte_perm(word, 0, 0x4441);
        const uint32_t minimum0 = __byte_perm(word, 0, 0x2222), minimum1 = __byte_perm(word, 0, 0x3333);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint4 half = j < 2 ? codes[b].low : codes[b].high;
          const uint32_t x = j % 2 == 0 ? half.x : half.z, y = j % 2 == 0 ? half.y : half.w;
          WgmmaWait<4 * kBlocks - 1>();
          if (b == kBlocks - 1 && j == 3) {
            // The step before is done, and the weights of this one are in registers: the wgmma before used the last.
            if (step > 0) ArriveActivations(c, ActivationsEmpty(c.slot.Previous()));
            MbarrierArrive(WeightsEmpty(c.ring.stage));
          }
          uint32_t(&operand_a)[4] = a[b][j];
          operand_a[0] = Unpack(x, scale0, minimum0);
          operand_a[1] = Unpack(y, scale1, minimum1);
          operand_a[2] = Unpack(x >> 4, scale0, minimum0);
          operand_a[3] = Unpack(y >> 4, scale1, minimum1);
          WgmmaFence();
          const uint32_t operand_b = descriptor + 2 * j + (kSharesDepth ? b * kTokens * kDepthBlock / 16 : 0);
          WgmmaU8S8<kTokens>::Run(sums[kSharesDepth ? 0 : b], operand_a, operand_b);
          WgmmaCommit();
        }
      }
      c.ring.Advance();
      c.slot.Advance();
    }
    WgmmaWait<0>();
    if (steps > 0) ArriveActivations(c, ActivationsEmpty(c.slot.Previous()));
  }

  // Adds the sums of two warpgroups that share K, in one block or in two of a cluster: one takes the other's.
  template <int kBlocks>
  __device__ __forceinline__ void AddPeer(Consumer& c, bool takes, int32_t (&sums)[kBlocks][kTokens / 2]) const {
    constexpr int kSums = kBlocks * kTokens / 2;
    constexpr int kChunk = kConfig.exchange_sums() < kSums ? kConfig.exchange_sums() : kSums;
    constexpr bool kRemote = kConfig.halves_depth();
    const uint32_t buffer = base + kConfig.exchange_at() + c.thread * 16;
    int32_t* flat = &sums[0][0];
#pragma unroll
    for (int chunk = 0; chunk < kSums; chunk += kChunk) {
      const uint32_t parity = c.sums_passed & 1;
      ++c.sums_passed;
      if (takes) {
        if (kRemote && c.thread == 0) MbarrierArriveExpect(SumFull(), kChunk * 512);
        MbarrierWait(SumFull(), parity);
#pragma unroll
        for (int i = 0; i < kChunk; i += 4) {
          const uint4 four = LoadShared128(buffer + i * 512);
          flat[chunk + i] += static_cast<int32_t>(four.x);
          flat[chunk + i + 1] += static_cast<int32_t>(four.y);
          flat[chunk + i + 2] += static_cast<int32_t>(four.z);
          flat[chunk + i + 3] += static_cast<int32_t>(four.w);
        }
        if constexpr (kRemote) {
          __syncwarp();
          if (c.lane == 0) MbarrierArriveRemote(SumEmpty(), rank ^ 1);
        } else {
          MbarrierArrive(SumEmpty());
        }
      } else {
        if (c.sums_passed > 1) MbarrierWait(SumEmpty(), parity ^ 1);
#pragma unroll
        for (int i = 0; i < kChunk; i += 4) {
          const int4 four = make_int4(flat[chunk + i], flat[chunk + i + 1], flat[chunk + i + 2], flat[chunk + i + 3]);
          if constexpr (kRemote) {
            StoreAsync128(ClusterAddress(buffer + i * 512, rank ^ 1), four, ClusterAddress(SumFull(), rank ^ 1));
          } else {
            StoreShared128(buffer + i * 512, *reinterpret_cast<const uint4*>(&four));
          }
        }
        if constexpr (!kRemote) MbarrierArrive(SumFull());
      }
    }
  }

  // Leaves the sums of a tile that another worker opened.
  template <int kBlocks>
  __device__ __forceinline__ void LeaveSums(const Consumer& c, const int32_t (&sums)[kBlocks][kTokens / 2]) const {
    constexpr int kChunk = kConfig.chunk_sums(), kWarpgroups = kConfig.sum_warpgroups();
    const int32_t* flat = &sums[0][0];
    int4* to = PartialsOf(worker) + (kWarpgroups > 1 ? c.warpgroup : 0) * (kChunk * 32) + c.thread;
#pragma unroll
    for (int i = 0; i < kBlocks * kTokens / 2; i += 4) {
      __stcg(to + (i / kChunk * kWarpgroups * kChunk + i % kChunk) * 32,
             make_int4(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]));
    }
    MbarrierArrive(SumsLeft());
  }

  // Adds what `workers` others left.
  template <int kBlocks>
  __device__ __forceinline__ void TakeSums(Consumer& c, int workers, int32_t (&sums)[kBlocks][kTokens / 2]) const {
    constexpr int kSums = kBlocks * kTokens / 2, kChunk = kConfig.chunk_sums();
    int32_t* flat = &sums[0][0];
    const uint32_t from = base + (kConfig.sum_warpgroups() > 1 ? c.warpgroup : 0) * (kChunk * 512) + c.thread * 16;
    for (int i = 0; i < workers; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < kConfig.chunks(); ++chunk) {
        MbarrierWait(Full(c.ring.stage), c.ring.parity);
        const uint32_t slot = from + c.slot.stage * kConfig.activation_bytes();
#pragma unroll
        for (int j = 0; j < kChunk && chunk * kChunk + j < kSums; j += 4) {
          const uint4 four = LoadShared128(slot + j * 512);
          int32_t* to = flat + chunk * kChunk + j;
          to[0] += static_cast<int32_t>(four.x);
          to[1] += static_cast<int32_t>(four.y);
          to[2] += static_cast<int32_t>(four.z);
          to[3] += static_cast<int32_t>(four.w);
        }
        GiveBack(c);
      }
    }
  }

  // The stage and slot of a step that needs nothing more of them.
  __device__ __forceinline__ void GiveBack(Consumer& c) const {
    __syncwarp();
    MbarrierArrive(WeightsEmpty(c.ring.stage));
    ArriveActivations(c, ActivationsEmpty(c.slot.stage));
    c.ring.Advance();
    c.slot.Advance();
  }
  __device__ __forceinline__ void PassSteps(Consumer& c, int steps) const {
    for (; steps > 0; --steps) {
      MbarrierWait(Full(c.ring.stage), c.ring.parity);
      GiveBack(c);
    }
  }

  // Whether this warpgroup ends up with sums, and stores them.
  __device__ __forceinline__ bool Takes(const Consumer& c) const {
    return kConfig.shares_depth ? c.warpgroup == 0 : !kConfig.halves_depth() || c.warpgroup == static_cast<int>(rank);
  }

  template <int kBlocks>
  __device__ __forceinline__ void Compute(Consumer& c, const WorkItem& item, int first_block) const {
    const int channel =
        (item.row_block + (kSharesDepth ? 0 : (kMulticasts ? FirstBlock(item, 0) : 0) + first_block)) * kRowBlock;
    const int token = item.token_tile * p.split.tile_tokens;
    const int tokens = min(p.split.tile_tokens, p.rows - token);
    const bool takes = Takes(c);
    constexpr int kSums = kSharesDepth ? 1 : kBlocks;  // row blocks
    if (takes && Opens(item)) FetchVectors(c, kSums, channel, token, tokens);
    int32_t sums[kSums][kTokens / 2];
#pragma unroll
    for (int b = 0; b < kSums; ++b) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[b][i] = 0;
    }
    Multiply<kBlocks>(c, End(item) - Begin(item), first_block, sums);
    if constexpr (kConfig.exchanges()) {
      AddPeer<kSums>(c, takes, sums);
      if (!takes) {
        PassSteps(c, SumSteps(item));
        return;
      }
    }
    if constexpr (kConfig.streams()) {
      if (!Opens(item)) {
        LeaveSums<kSums>(c, sums);
        return;
      }
      TakeSums<kSums>(c, Others(item), sums);
    }
    CopyAsyncWaitAll();
    WarpgroupSync(c.warpgroup);
    const Vectors vectors = VectorsOf(c.warpgroup);
    const uint32_t staging =
        base + kConfig.staging_at() + (kConfig.storers() > 1 ? c.warpgroup : 0) * kConfig.staging_bytes();
    const auto store = [&]<GemmOutput kOutput>() {
#pragma unroll
      for (int b = 0; b < kSums; ++b) {
        StoreBlock<kOutput, kTokens, kConfig.staged_tokens()>(p, sums[b], vectors, b * kRowBlock,
                                                              channel + b * kRowBlock, token, tokens, staging,
                                                              c.warpgroup, c.thread);
      }
    };
    if (p.output == GemmOutput::kBF16) {
      store.template operator()<GemmOutput::kBF16>();
    } else if (p.output == GemmOutput::kSiluMul) {
      store.template operator()<GemmOutput::kSiluMul>();
    } else {
      store.template operator()<GemmOutput::kF32>();
    }
  }

  __device__ __forceinline__ void Consume() const {
    Consumer c;
    c.warpgroup = threadIdx.x / 128;
    c.thread = threadIdx.x % 128;
    c.warp = c.thread / 32;
    c.lane = c.thread % 32;
    Schedule schedule(p.split, worker);
    WorkItem item;
    bool more = schedule.Next(p.split, worker, &item);
    GridDependencyWait();
    for (; more; more = schedule.Next(p.split, worker, &item)) {
      if constexpr (kConfig.shares_depth) {
        Compute<kConfig.blocks>(c, item, c.warpgroup * kConfig.blocks);
        continue;
      }
      // A tile with fewer blocks than the configuration has is shared evenly.
      const int begin = FirstBlock(item, c.warpgroup), blocks = FirstBlock(item, c.warpgroup + 1) - begin;
      const int first_block = begin - (kMulticasts ? FirstBlock(item, 0) : 0);
      if (blocks == kConfig.blocks) {
        Compute<kConfig.blocks>(c, item, first_block);
      } else if (kConfig.blocks > 1 && blocks == 1) {
        Compute<1>(c, item, first_block);
      } else {
        PassSteps(c, End(item) - Begin(item) + SumSteps(item));
        if (Takes(c) && !Opens(item)) MbarrierArrive(SumsLeft());
      }
    }
  }
};

}  // namespace nibble::cuda::gemm
