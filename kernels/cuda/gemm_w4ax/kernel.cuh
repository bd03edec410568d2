// The W4Ax kernel. One warpgroup copies: its first warp weights, its second activations, both through one ring of
// steps. Two warpgroups multiply: they unpack weights in registers, as operand A of wgmma, and read activations, its
// operand B, from shared memory. docs/kernels-gemm.md draws it.
//
// Registers are shared out again after the launch (setmaxnreg): the copying warps give theirs to the others. The sums
// of both sides must be what the launch allocated, or the kernel never starts.
#pragma once

#include "kernels/cuda/gemm_w4ax/epilogue.cuh"
#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/ptx/bulk_copy.h"
#include "kernels/cuda/ptx/cluster.h"
#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/flag.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/shared.h"
#include "kernels/cuda/ptx/tma.h"
#include "kernels/cuda/ptx/wgmma.h"

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

  // ---- copying -----------------------------------------------------------------------------------------------------

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

  // ---- multiplying -------------------------------------------------------------------------------------------------

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

template <int kIndex>
__global__ void __launch_bounds__(128 * (kConsumers + 1), kGemmConfigs[kIndex].residents)
    W4AxGemm(const __grid_constant__ CUtensorMap activations, const __grid_constant__ GemmParams p) {
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  constexpr int kCopyRegisters = 40, kMultiplyRegisters = kConfig.residents > 1 ? 96 : 232;
  extern __shared__ __align__(1024) uint8_t shared[];
  const Block<kIndex> block(p, shared);
  if (threadIdx.x == 0) {
    if (block.base % 1024 != 0) __trap();
    block.InitBarriers();
  }
  if constexpr (kConfig.cluster > 1) {
    ClusterSync();
  } else {
    __syncthreads();
  }
  GridDependencyLaunch();
  const int warp = threadIdx.x / 32;
  if (warp >= 4 * kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    if (warp == 4 * kConsumers && threadIdx.x % 32 == 0) {
      int64_t cycles = clock64(), nanoseconds;
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
      block.CopyWeights();
      if (p.clock != nullptr && blockIdx.x == 0) {
        int64_t end;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
        p.clock[0] = clock64() - cycles;
        p.clock[1] = end - nanoseconds;
      }
    } else if (warp == 4 * kConsumers + 1 && threadIdx.x % 32 == 0) {
      TmaPrefetchDescriptor(&activations);
      GridDependencyWait();
      block.CopyActivations(&activations);
    } else if (kConfig.streams() && warp == 4 * kConsumers + 2 && threadIdx.x % 32 == 0) {
      block.AnnounceSums();
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
    block.Consume();
  }
  if constexpr (kConfig.cluster > 1) ClusterSync();  // no block leaves while its peer still writes to it
}

}  // namespace nibble::cuda::gemm

namespace nibble::cuda {

template <int kIndex>
const void* GemmKernelOf() {
  return reinterpret_cast<const void*>(&gemm::W4AxGemm<kIndex>);
}

}  // namespace nibble::cuda
