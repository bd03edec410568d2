// Folding: the streams of a chunk, chunks of a group, groups of a head, by one warp of the block; and what a cut of the
// line divides, through memory, by the block that finishes such a head last.
#pragma once

#include "kernels/cuda/attention/decode_shared.cuh"
#include "kernels/cuda/ptx/barrier.h"
#include "kernels/cuda/ptx/bulk_copy.h"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {

__device__ __forceinline__ float4 Fold(const float4& into, const float4& accumulators, const FoldFactors& factors) {
  return make_float4(Fold(into.x, accumulators.x, factors), Fold(into.y, accumulators.y, factors),
                     Fold(into.z, accumulators.z, factors), Fold(into.w, accumulators.w, factors));
}

// Unit u = 32 i + lane, a quadruple of channels: head 2t + i / words, channels 4·words·g + 4 (i % words) ...
template <int kWords>
__device__ __forceinline__ int UnitHead(int unit) {
  return 2 * (unit % 4) + unit / (32 * kWords);
}
template <int kWords>
__device__ __forceinline__ int UnitChannel(int unit) {
  return 4 * kWords * (unit % 32 / 4) + 4 * (unit / 32 % kWords);
}

template <int kWords>
__device__ __forceinline__ void StoreOutput(const DecodeParameters& p, const Piece& piece, int unit,
                                            const SoftmaxState& state, float inverse, const float4& a) {
  const int in_group = piece.head % p.tiles * kTileHeads + UnitHead<kWords>(unit);
  if (in_group >= p.group) return;
  const uint2 packed = make_uint2(
      PackBf16(Output(a.x, kLowNibbleUnit, state.zero, inverse), Output(a.y, kHighNibbleUnit, state.zero, inverse)),
      PackBf16(Output(a.z, kLowNibbleUnit, state.zero, inverse), Output(a.w, kHighNibbleUnit, state.zero, inverse)));
  const int head = piece.head / p.tiles * p.group + in_group;
  *reinterpret_cast<uint2*>(p.out + piece.row * p.out_stride + head * Sizes<kWords>::kHeadDim +
                            UnitChannel<kWords>(unit)) = packed;
}

// A unit on its own.
struct FoldedUnit {
  SoftmaxState state;
  float4 accumulators;
  __device__ __forceinline__ void Fold(bool first, const FoldedUnit& other) {
    if (first) {
      *this = other;
    } else {
      const FoldFactors factors = cuda::Fold(&state, other.state);
      accumulators = cuda::Fold(accumulators, other.accumulators, factors);
    }
  }
};

// All units of a partial result in one warp: lane's are lane + 32 n, the first half of head 2t, the second of 2t + 1.
template <int kWords>
struct Folded {
  static constexpr int kCount = 2 * kWords;
  SoftmaxState states[2];
  float4 units[kCount];
  static __device__ __forceinline__ int Unit(int n) { return threadIdx.x % 32 + n * 32; }
  static __device__ __forceinline__ int Head(int h) { return 2 * (threadIdx.x % 4) + h; }

  // total ⊕ this, of a total that this warp stored.
  __device__ __forceinline__ void FoldBehind(const float4* partial) {
    FoldFactors factors[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 state = __ldcg(partial + Sizes<kWords>::kUnits + Head(h));
      SoftmaxState total = {state.x, state.y, state.z};
      factors[h] = Fold(&total, states[h]);
      states[h] = total;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) units[n] = Fold(__ldcg(partial + Unit(n)), units[n], factors[n / kWords]);
  }
  __device__ __forceinline__ void Store(float4* partial) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) partial[Unit(n)] = units[n];
    if (threadIdx.x % 32 < 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        partial[Sizes<kWords>::kUnits + Head(h)] = make_float4(states[h].max, states[h].sum, states[h].zero, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void Output(const DecodeParameters& p, const Piece& piece) const {
    const float inverse[2] = {1.0f / states[0].sum, 1.0f / states[1].sum};
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      StoreOutput<kWords>(p, piece, Unit(n), states[n / kWords], inverse[n / kWords], units[n]);
    }
  }
};

// Lists the partials of a divided head in order, block after block, from number `skip` on, as many as the list holds:
// their places, and a bit for those that start a group. Returns how many there are in all. One warp.
__device__ __forceinline__ int ListPartials(const DecodeParameters& p, const HeadLine& line, const DividedHead& head,
                                            int skip, uint32_t* list) {
  const Piece& piece = head.piece;
  const int lane = threadIdx.x % 32, pages = piece.pages(), chunks = ChunksOf(pages);
  int listed = 0;
  for (int block = head.first_block + lane;; block += 32) {
    const int begin = ChunkBoundary(line.Cut(block) - piece.start, pages);
    const int end = ChunkBoundary(line.Cut(block + 1) - piece.start, pages);
    const int count = PartialCount(begin, end);
    int to = count;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int more = __shfl_up_sync(~0u, to, lanes);
      if (lane >= lanes) to += more;
    }
    const uint32_t place = FirstPartial(block, begin != 0, p.step.max_pages);
    int chunk = begin;
    for (int i = 0; i < count; ++i) {
      const int at = listed + to - count + i - skip;
      if (at >= 0 && at < kListedPartials) {
        list[at] = (place + i) | (chunk % kGroupChunks == 0 ? kStartsGroup : 0);
      }
      chunk = PartialEnd(chunk, end);
    }
    listed += __shfl_sync(~0u, to, 31);
    if (__shfl_sync(~0u, end, 31) == chunks) return listed;
  }
}

// Folds the partials of a divided head, in order, and writes the output: the first 128 threads of a block that has
// nothing else left to do, through the ring of pages. `copies` counts the uses of the barrier.
template <int kWords>
__device__ __forceinline__ void Combine(const DecodeParameters& p, const HeadLine& line, const DividedHead& head,
                                        DecodeShared<kWords>& shared, int* copies) {
  using S = Sizes<kWords>;
  constexpr int kThreads = kStreams * 32, kThreadUnits = S::kUnits / kThreads;
  constexpr int kPartialBytes = S::kPartialFloat4 * static_cast<int>(sizeof(float4));
  static_assert(kListedPartials * kPartialBytes <= static_cast<int>(sizeof(shared.ring)) && kListedPartials <= 32);
  FoldedUnit total[kThreadUnits], group[kThreadUnits];
  bool total_empty = true, group_empty = true;
  for (int skip = 0, all = 1; skip < all; skip += kListedPartials) {
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      all = ListPartials(p, line, head, skip, shared.partial_list);
      if (lane == 0) {
        shared.partial_count = all;
        MbarrierArriveExpect(SharedAddress(&shared.partials_full), min(all - skip, kListedPartials) * kPartialBytes);
      }
      __syncwarp();
      FenceGlobalBeforeCopy();
      if (lane < min(all - skip, kListedPartials)) {
        const uint32_t place = shared.partial_list[lane] & ~kStartsGroup;
        BulkCopy(SharedAddress(shared.ring) + lane * kPartialBytes,
                 p.partials + static_cast<int64_t>(place) * S::kPartialFloat4, kPartialBytes,
                 SharedAddress(&shared.partials_full));
      }
    }
    BarrierSync<kThreads>(1);
    all = shared.partial_count;
    MbarrierWait(SharedAddress(&shared.partials_full), *copies & 1);
    ++*copies;
#pragma unroll 1
    for (int k = 0; k < min(all - skip, kListedPartials); ++k) {
      const float4* partial = reinterpret_cast<const float4*>(shared.ring + k * kPartialBytes);
      const bool starts = (shared.partial_list[k] & kStartsGroup) != 0;
#pragma unroll
      for (int n = 0; n < kThreadUnits; ++n) {
        const int unit = threadIdx.x + n * kThreads;
        const float4 state = partial[S::kUnits + UnitHead<kWords>(unit)];
        if (starts && !group_empty) total[n].Fold(total_empty, group[n]);
        group[n].Fold(starts || group_empty, {{state.x, state.y, state.z}, partial[unit]});
      }
      if (starts && !group_empty) total_empty = false;
      group_empty = false;
    }
    BarrierSync<kThreads>(1);
  }
#pragma unroll
  for (int n = 0; n < kThreadUnits; ++n) {
    total[n].Fold(total_empty, group[n]);
    StoreOutput<kWords>(p, head.piece, threadIdx.x + n * kThreads, total[n].state, 1.0f / total[n].state.sum,
                        total[n].accumulators);
  }
}

// Folds all chunks of the block, as they come.
template <int kWords>
class Folder {
 public:
  using S = Sizes<kWords>;
  using P = Folded<kWords>;

  __device__ __forceinline__ Folder(const DecodeParameters& p, const HeadLine& line, DecodeShared<kWords>& shared)
      : p_(p), line_(line), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    GridDependencyWait();
    while (true) {
      WaitTurn<kWorks>(shared_.work_full, done_);
      const ChunkWork& work = shared_.works[done_ % kWorks];
      if (work.page_count == 0) return;
      FoldPiece(work.piece);
    }
  }

 private:
  // Folds a piece: a whole head into the output, one of a divided head into partial results.
  __device__ __forceinline__ void FoldPiece(const Piece piece) {
    const bool whole = piece.begin == 0 && piece.end == ChunksOf(piece.pages());
    const int place = whole ? TotalPartial(blockIdx.x, p_.step.max_pages)
                            : FirstPartial(blockIdx.x, piece.begin != 0, p_.step.max_pages);
    float4* partial = p_.partials + static_cast<int64_t>(place) * S::kPartialFloat4;
    P group;
    int chunk = piece.begin;
    while (true) {
      const int begin = chunk, end = PartialEnd(chunk, piece.end);
      for (; chunk < end; ++chunk) FoldChunk(piece, chunk, chunk == begin, &group);
      if (whole) {
        if (begin > 0) group.FoldBehind(partial);
        if (chunk == piece.end) break;
        group.Store(partial);
        __syncwarp();
      } else {
        group.Store(partial);
        partial += S::kPartialFloat4;
        if (chunk == piece.end) break;
      }
    }
    if (whole) {
      group.Output(p_, piece);
    } else {
      Count(piece);
    }
  }

  __device__ __forceinline__ void FoldChunk(const Piece& piece, int chunk, bool starts, P* group) {
    WaitTurn<kWorks>(shared_.work_full, done_);
    WaitTurn<kMerges>(shared_.merge_full, done_);
    const int streams = min(piece.pages() - chunk * kChunkPages, kStreams);
    if (streams == kStreams) {
      FoldStreams(shared_.merge[done_ % kMerges], kStreams, starts, group);
    } else {
      FoldStreams(shared_.merge[done_ % kMerges], streams, starts, group);
    }
    ArriveTurn<kWorks>(shared_.work_empty, done_);
    ++done_;
  }

  // The streams of a chunk into the group, which the chunk starts or goes on.
  __device__ __forceinline__ void FoldStreams(const float4 (&merge)[kStreams][S::kPartialFloat4], int streams,
                                              bool group_starts, P* group) const {
    SoftmaxState states[2];
    FoldFactors factors[kStreams][2];  // of streams 1 ..; of the group, first
#pragma unroll
    for (int w = 0; w < kStreams; ++w) {
      if (w >= streams) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 loaded = merge[w][S::kUnits + P::Head(h)];
        const SoftmaxState state = {loaded.x, loaded.y, loaded.z};
        if (w == 0) {
          states[h] = state;
        } else {
          factors[w][h] = Fold(&states[h], state);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (group_starts) {
        group->states[h] = states[h];
      } else {
        factors[0][h] = Fold(&group->states[h], states[h]);
      }
    }
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      float4 unit = merge[0][P::Unit(i)];
#pragma unroll
      for (int w = 1; w < kStreams; ++w) {
        if (w >= streams) break;
        unit = Fold(unit, merge[w][P::Unit(i)], factors[w][i / kWords]);
      }
      group->units[i] = group_starts ? unit : Fold(group->units[i], unit, factors[0][i / kWords]);
    }
  }

  // A piece of a divided head is stored: the block that stores the last one combines them, at its end.
  __device__ __forceinline__ void Count(const Piece& piece) {
    const int pages = piece.pages(), chunks = ChunksOf(pages);
    int first_block = max(piece.start / line_.share - 1, 0);
    while (ChunkBoundary(line_.Cut(first_block + 1) - piece.start, pages) == 0) ++first_block;
    __threadfence();  // this thread's partials, before the warp's arrival
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const uint32_t done = piece.end - piece.begin;
    if (atomicAdd(p_.counters + first_block, done) + done != static_cast<uint32_t>(chunks)) return;
    p_.counters[first_block] = 0;
    __threadfence();
    shared_.divided[shared_.divided_count++] = {piece, first_block};
  }

  const DecodeParameters& p_;
  const HeadLine& line_;
  DecodeShared<kWords>& shared_;
  int done_ = 0;  // chunks
};

}  // namespace nibble::cuda
