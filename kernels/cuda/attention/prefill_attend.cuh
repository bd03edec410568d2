// The multiplying warpgroups of the prefill kernel: S = Q · Kᵀ and O += P · V, page after page, 64 queries each.
#pragma once

#include "kernels/cuda/attention/prefill_shared.cuh"
#include "kernels/cuda/attention/prefill_softmax.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/wgmma_f16.h"

namespace nibble::cuda {

__device__ __forceinline__ void WarpgroupBarrier(int warpgroup) {
  if (warpgroup == 0) {
    asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroupThreads) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(kWarpgroupThreads) : "memory");
  }
}

__device__ __forceinline__ void StoreShared32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// A warp's 16 queries, of the tile's from `first` on: operands of S = Q · Kᵀ into its rows of the warpgroup's, and what
// else is needed of them.
template <int kHeadDim>
__device__ __forceinline__ void StoreQueries(const PrefillParameters& p, const Tile& tile, int first,
                                             uint32_t shared_q, QueryRows* rows) {
  constexpr int kLanes = kHeadDim / 8, kWords = kHeadDim / 32;
  const int lane = threadIdx.x % 32, channels = lane % kLanes, warp_row = threadIdx.x / 32 % 4 * 16;
  constexpr int kQueries = 32 / kLanes;  // of the warp at a time
  uint4 raw[16 / kQueries];
#pragma unroll
  for (int i = 0; i < 16 / kQueries; ++i) {
    const int pair = first + i * kQueries + lane / kLanes, row = pair / p.group;
    const int head = tile.kv_head * p.group + pair % p.group;
    const __nv_bfloat16* q = p.q + (tile.row + row) * p.q_stride + head * kHeadDim + 8 * channels;
    raw[i] = row < tile.rows ? __ldcg(reinterpret_cast<const uint4*>(q)) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < 16 / kQueries; ++i) {
    const int query = i * kQueries + lane / kLanes;
    QueryFactors factors;
    const uint4 words = PrepareQuery<kHeadDim>(raw[i], p.scale_log2e, &factors);
    const int w = channels % kWords, t = channels / kWords;
    const uint32_t atom = shared_q + w / 2 * (64 * kAtomBytes) + 4 * t;
    const uint32_t operands[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) StoreShared32(atom + Swizzled(warp_row + query, w % 2 * 64 + 16 * j), operands[j]);
    if (channels == 0) {
      rows->factors[query] = factors;
      rows->position[query] = tile.position + min((first + query) / p.group, tile.rows - 1);
    }
  }
  if (lane == 0) rows->tile = tile;
  FenceProxyAsync();
}

template <int kHeadDim>
__device__ __forceinline__ void StartDots(uint32_t shared_q, uint32_t stage_k, float (&dots)[32]) {
  const uint32_t q = WgmmaDescriptor(shared_q), k = WgmmaDescriptor(stage_k);
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    const int atom = s / 4 * (64 * kAtomBytes / 16) + s % 4 * 2;
    WgmmaF16(dots, q + atom, k + atom, s != 0);
  }
  WgmmaCommit();
}

template <int kHeadDim>
__device__ __forceinline__ void StartOutputs(const uint32_t (&weights)[4][4], uint32_t stage_v,
                                             float (&o)[kHeadDim / 2]) {
  const uint32_t v = WgmmaDescriptor(stage_v);
#pragma unroll
  for (int s = 0; s < 4; ++s) WgmmaF16(o, weights[s], v + 2 * s, 1);
  WgmmaCommit();
}

// From one lane's value, the compiler knows that all have the same.
__device__ __forceinline__ PageStep LoadStep(const PageStep* from) {
  const uint2 words = LoadShared64(SharedAddress(from));
  return {static_cast<int>(__shfl_sync(~0u, words.x, 0)), __shfl_sync(~0u, words.y, 0)};
}

template <int kHeadDim>
__device__ __forceinline__ void StoreOutputs(const PrefillParameters& p, const Tile& tile, int first,
                                             const float (&o)[kHeadDim / 2], const SoftmaxState (&state)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int pair = first + lane / 4 + 8 * r, row = pair / p.group;
    if (row >= tile.rows) continue;
    const float inverse = 1.0f / state[r].sum, zero = state[r].zero;
    __nv_bfloat16* out = p.out + (tile.row + row) * p.out_stride +
                         (tile.kv_head * p.group + pair % p.group) * kHeadDim + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + 8 * j) =
          PackBf16(Output(o[4 * j + 2 * r], kLowNibbleUnit, zero, inverse),
                   Output(o[4 * j + 2 * r + 1], kHighNibbleUnit, zero, inverse));
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Attend(const PrefillParameters& p, int warpgroup, PrefillShared<kHeadDim>* shared) {
  const int lane = threadIdx.x % 32, warp = warpgroup * 4 + threadIdx.x / 32 % 4, first = warp * 16;
  const uint32_t q = SharedAddress(shared->q[warpgroup]);
  // Where a level keeps what is folded so far: the chunk's in shared memory, the group's and the result's in scratch.
  const auto kept_at = [&](int level) {
    if (level == 0) return &shared->kept[warp][lane];
    const int64_t warp_of_grid = static_cast<int64_t>(blockIdx.x) * (kMultipliers * 4) + warp;
    return p.folded + (warp_of_grid * 2 + level - 1) * kKeptFloat4<kHeadDim> + lane;
  };
  const auto release = [](Barriers& barriers) { MbarrierArrive(SharedAddress(&barriers.empty)); };
  const auto await = [](Barriers& barriers, uint32_t parity) { MbarrierWait(SharedAddress(&barriers.full), parity); };
  QueryRows& rows = shared->rows[warp];
  Turn turn(0);
  while (true) {
    await(shared->k_barriers[turn.stage()], turn.parity());
    {
      const Tile tile = shared->tiles[turn.stage()];
      if (__shfl_sync(~0u, tile.rows, 0) == 0) return;
      WarpgroupBarrier(warpgroup);  // the last tile's queries have been multiplied
      StoreQueries<kHeadDim>(p, tile, first, q, &rows);
      WarpgroupBarrier(warpgroup);
    }
    const QueryFactors factors[2] = {rows.factors[lane / 4], rows.factors[lane / 4 + 8]};
    Stream<kHeadDim> stream;
    SoftmaxState state[2];
    float dots[32], scores[32], page_max[2];
    uint32_t weights[4][4];
    KeyParameters parameters;
    stream.Clear();
    WgmmaFence();
    StartDots<kHeadDim>(q, SharedAddress(shared->k[turn.stage()]), dots);
    WgmmaWait<0>();
    // Round the loop go the dots of a page and the weights of the page before it: none before the first.
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = 0;
    await(shared->v_barriers[turn.stage()], turn.parity());
    int before_stage = turn.stage();
    PageStep step, before;
    do {
      step = LoadStep(&shared->steps[turn.stage()]);
      parameters.Load(shared->k_parameters[turn.stage()]);
      WgmmaFence();
      StartOutputs<kHeadDim>(weights, SharedAddress(shared->v[before_stage]), stream.o);
      if (!step.IsMasked(warpgroup)) {
        Scores<false>(dots, parameters, factors, {}, scores, page_max);
      } else {
        const int last[2] = {rows.position[lane / 4] - step.first_token, rows.position[lane / 4 + 8] - step.first_token};
        Scores<true>(dots, parameters, factors, last, scores, page_max);
      }
      // The next page's dots; after the last page its own once more, which nobody reads.
      const Turn next = turn.After(step.IsLast() ? 0 : 1);
      await(shared->k_barriers[next.stage()], next.parity());
      WgmmaFence();
      StartDots<kHeadDim>(q, SharedAddress(shared->k[next.stage()]), dots);
      WgmmaWait<1>();
      if (!step.IsFirst()) {
        release(shared->v_barriers[before_stage]);
        if (before.Reaches(0)) {
          Finish(stream, factors, state);
#pragma unroll 1
          for (int level = 0;; ++level) {
            float4* kept = kept_at(level);
            if (before.Follows(level)) FoldKept<kHeadDim>(kept, stream.o, state);
            if (level < 2 && before.Reaches(level + 1)) continue;
            Keep<kHeadDim>(stream.o, state, kept);
            break;
          }
          stream.Clear();
        }
        await(shared->v_barriers[turn.stage()], turn.parity());
      }
      MoveReferences(page_max, factors, &stream);
      Weights(scores, shared->v_parameters[turn.stage()], factors, &stream, weights);
      WgmmaWait<0>();
      release(shared->k_barriers[turn.stage()]);
      before_stage = turn.stage();
      before = step;
      turn = turn.After(1);
    } while (!before.IsLast());
    WgmmaFence();
    StartOutputs<kHeadDim>(weights, SharedAddress(shared->v[before_stage]), stream.o);
    WgmmaWait<0>();
    release(shared->v_barriers[before_stage]);
    Finish(stream, factors, state);
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {
      if (before.Follows(level)) FoldKept<kHeadDim>(kept_at(level), stream.o, state);
    }
    const Tile tile = rows.tile;
    StoreOutputs<kHeadDim>(p, tile, first, stream.o, state);
  }
}

}  // namespace nibble::cuda
