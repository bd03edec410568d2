// The multiplying warpgroups of the prefill kernel: S = Q · Kᵀ and O += P · V, page after page, 64 queries each.
#pragma once

#include "kernels/cuda/attention/prefill_shared.cuh"
#include "kernels/cuda/attention/prefill_softmax.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/wgmma_f16.h"

namespace nibble::cuda {

// A warp's 16 queries as operands of S = Q · Kᵀ.
template <int kHeadDim>
struct Queries {
  uint32_t of[kHeadDim / 16][4];
};

// The warp's queries, of the tile's from `first` on; what else is needed of them goes to `rows`. `staging` is shared
// memory of the warp for 16 rows.
template <int kHeadDim>
__device__ __forceinline__ void LoadQueries(const PrefillParameters& p, const Tile& tile, int first, uint32_t staging,
                                            QueryRows* rows, Queries<kHeadDim>* queries) {
  constexpr int kLanes = kHeadDim / 8, kWords = kHeadDim / 32;
  constexpr int kQueries = 32 / kLanes, kTimes = 16 / kQueries;  // of the warp at a time, and how often
  const int lane = threadIdx.x % 32, channels = lane % kLanes;
  uint4 words[kTimes];
  QueryFactors factors[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const Pair pair(p, first + i * kQueries + lane / kLanes);
    const int head = tile.kv_head * p.group + pair.head;
    const __nv_bfloat16* q = p.q + (tile.row + pair.row) * p.q_stride + head * kHeadDim + 8 * channels;
    words[i] = pair.row < tile.rows ? __ldcg(reinterpret_cast<const uint4*>(q)) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kTimes; ++i) words[i] = PrepareQuery<kHeadDim>(words[i], p.scale_log2e, &factors[i]);
  __syncwarp();  // the last tile's use of the memory is over
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int query = i * kQueries + lane / kLanes, w = channels % kWords, t = channels / kWords;
    const uint32_t atom = staging + w / 2 * (16 * kAtomBytes) + 4 * t;
    const uint32_t operands[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) StoreShared32(atom + Swizzled(query, w % 2 * 64 + 16 * j), operands[j]);
  }
  if (channels == 0) {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int query = i * kQueries + lane / kLanes;
      rows->factors[query] = factors[i];
      rows->position[query] = tile.position + min(Pair(p, first + query).row, tile.rows - 1);
    }
  }
  if (lane == 0) rows->tile = tile;
  __syncwarp();
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    uint32_t(&q)[4] = queries->of[s];
    LoadMatrices(staging + s / 4 * (16 * kAtomBytes) + Swizzled(lane % 16, s % 4 * 32 + lane / 16 * 16), q[0], q[1],
                 q[2], q[3]);
  }
  __syncwarp();  // before the warp keeps what it folds there
}

template <int kHeadDim>
__device__ __forceinline__ void StartDots(const Queries<kHeadDim>& queries, uint32_t stage_k, float (&dots)[32]) {
  const uint32_t k = WgmmaDescriptor(stage_k);
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    WgmmaF16(dots, queries.of[s], k + s / 4 * (64 * kAtomBytes / 16) + s % 4 * 2, s != 0);
  }
  WgmmaCommit();
}

template <int kHeadDim>
__device__ __forceinline__ void StartOutputs(const uint32_t (&weights)[4][4], uint32_t stage_v, bool starts_stream,
                                             float (&o)[kHeadDim / 2]) {
  const uint32_t v = WgmmaDescriptor(stage_v);
#pragma unroll
  for (int s = 0; s < 4; ++s) WgmmaF16(o, weights[s], v + 2 * s, s != 0 || !starts_stream);
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
    const Pair pair(p, first + lane / 4 + 8 * r);
    if (pair.row >= tile.rows) continue;
    const float inverse = 1.0f / state[r].sum, zero = state[r].zero;
    __nv_bfloat16* out =
        p.out + (tile.row + pair.row) * p.out_stride + (tile.kv_head * p.group + pair.head) * kHeadDim + 2 * (lane % 4);
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
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, warpgroup * 4 + threadIdx.x / 32 % 4, 0), first = warp * 16;
  // Where a level keeps what is folded so far: the chunk's in shared memory, the group's and the result's in scratch.
  const auto kept_at = [&](int level) {
    if (level == 0) return &shared->kept[warp][lane];
    const int64_t warp_of_grid = static_cast<int64_t>(blockIdx.x) * (kMultipliers * 4) + warp;
    return p.folded + (warp_of_grid * 2 + level - 1) * kKeptFloat4<kHeadDim> + lane;
  };
  const auto await_k = [&](const Turn& turn) {
    MbarrierWait(SharedAddress(&shared->k_full[turn.stage()]), turn.parity());
  };
  const auto await_v = [&](const Turn& turn) {
    MbarrierWait(SharedAddress(&shared->v_full[turn.stage()]), turn.parity());
  };
  QueryRows& rows = shared->rows[warp];
  for (int stage = 0; stage < kStages; ++stage) {  // the ring is empty
    SlotOfK(stage).GiveBack();
    SlotOfV(stage).GiveBack();
  }
  Turn turn(0);
  while (true) {
    await_k(turn);
    Queries<kHeadDim> queries;
    {
      const Tile tile = shared->tiles[turn.stage()];
      if (__shfl_sync(~0u, tile.rows, 0) == 0) return;
      LoadQueries(p, tile, first, SharedAddress(shared->kept[warp]), &rows, &queries);
    }
    const QueryFactors factors[2] = {rows.factors[lane / 4], rows.factors[lane / 4 + 8]};
    Stream<kHeadDim> stream;
    SoftmaxState state[2];
    float dots[32], scores[32], page_max[2];
    uint32_t weights[4][4];
    TokenParameters k_parameters, v_parameters;
    stream.Clear();
    WgmmaFence();
    StartDots(queries, SharedAddress(shared->k[turn.stage()]), dots);
    k_parameters.Load(shared->k_parameters[turn.stage()], lane % 4);
    PageStep step = LoadStep(&shared->steps[turn.stage()]), before = {0, 1u << PageStep::kStarts};
    WgmmaWait<0>();
    // With a page's dots and parameters in registers, its K is done with; the last page's dots are started once more.
    if (!step.IsLast()) SlotOfK(turn.stage()).GiveBack();
    // Round the loop go the dots of a page and the weights of the page before it: none before the first.
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = 0;
    await_v(turn);
    int before_stage = turn.stage();
    do {
      // The page whose dots are started; after the last page its own once more, which nobody reads.
      const Turn next = turn.After(step.IsLast() ? 0 : 1);
      WgmmaFence();
      StartOutputs<kHeadDim>(weights, SharedAddress(shared->v[before_stage]), before.Starts(), stream.o);
      if (!step.IsMasked(warpgroup)) {
        Scores<false>(dots, k_parameters, factors, {}, scores, page_max);
      } else {
        const int last[2] = {rows.position[lane / 4] - step.first_token, rows.position[lane / 4 + 8] - step.first_token};
        Scores<true>(dots, k_parameters, factors, last, scores, page_max);
      }
      await_k(next);
      await_v(turn);
      WgmmaFence();
      StartDots(queries, SharedAddress(shared->k[next.stage()]), dots);
      WgmmaWait<1>();
      if (!step.IsFirst()) {
        SlotOfV(before_stage).GiveBack();
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
      }
      v_parameters.Load(shared->v_parameters[turn.stage()], lane % 4);
      if (step.Starts()) {
        stream.reference[0] = RowMax(page_max[0]), stream.reference[1] = RowMax(page_max[1]);
      } else {
        MoveReferences(page_max, factors, &stream);
      }
      Weights(scores, v_parameters, factors, &stream, weights);
      k_parameters.Load(shared->k_parameters[next.stage()], lane % 4);
      before = step;
      step = LoadStep(&shared->steps[next.stage()]);
      WgmmaWait<0>();
      if (before.IsLast() || !step.IsLast()) SlotOfK(next.stage()).GiveBack();
      before_stage = turn.stage();
      turn = turn.After(1);
    } while (!before.IsLast());
    WgmmaFence();
    StartOutputs<kHeadDim>(weights, SharedAddress(shared->v[before_stage]), before.Starts(), stream.o);
    WgmmaWait<0>();
    SlotOfV(before_stage).GiveBack();
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
