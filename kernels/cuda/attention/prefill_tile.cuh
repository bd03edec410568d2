// The work of the prefill kernel: tiles of queries, and what is to be done with each page of a tile's context.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/attention/step_rows.cuh"

namespace nibble::cuda {

inline constexpr int kMultipliers = 2;  // warpgroups that multiply, of 64 queries each

struct PrefillParameters {
  StepView step;
  const uint8_t* pages;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_stride, out_stride;  // elements per row
  int kv_heads, group;
  uint32_t group_inverse;        // 2^16 / group, rounded up
  int tile_rows;                 // rows whose group · tile_rows query heads make a tile
  float scale_log2e;
  float4* folded;                // per warp: what is folded over the chunks of a group, and over groups
};

// Row and head in the group of one of a tile's 128 pairs.
struct Pair {
  int row, head;
  __device__ __forceinline__ Pair(const PrefillParameters& p, int pair) {
    row = static_cast<int>(pair * p.group_inverse >> 16);  // pair / group: exact, as both are at most 128
    head = pair - row * p.group;
  }
};

// One tile: rows [row, row + rows) of a sequence, the first at `position`.
struct Tile {
  int sequence, row, rows, position, kv_head;
  __device__ __forceinline__ int pages() const { return PagesOf(position + rows); }
};

// Tile `index` of the step; rows == 0 when there is none. Called by whole warps. Later tiles of a sequence, which have
// longer contexts, come first.
__device__ __forceinline__ Tile FindTile(const PrefillParameters& p, int index) {
  const int lane = threadIdx.x % 32;
  int rank = index / p.kv_heads;
  Tile found = {0, 0, 0, 0, index % p.kv_heads};
  for (int base = 0; base < p.step.sequences; base += 32) {
    const int sequence = base + lane;
    int first = 0, rows = 0;
    if (sequence < p.step.sequences) {
      first = __ldg(p.step.row_begin + sequence);
      rows = __ldg(p.step.row_begin + sequence + 1) - first;
    }
    const int tiles = rows > 1 ? (rows + p.tile_rows - 1) / p.tile_rows : 0;
    int to = tiles;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int more = __shfl_up_sync(~0u, to, lanes);
      if (lane >= lanes) to += more;
    }
    const uint32_t owner = __ballot_sync(~0u, rank >= to - tiles && rank < to);
    if (owner != 0) {
      const int from = __ffs(owner) - 1;
      const int tile = __shfl_sync(~0u, tiles - 1 - (rank - (to - tiles)), from);
      found.sequence = base + from;
      found.row = __shfl_sync(~0u, first, from) + tile * p.tile_rows;
      found.rows = min(__shfl_sync(~0u, rows, from) - tile * p.tile_rows, p.tile_rows);
      found.position = __ldg(p.step.positions + found.row);
      break;
    }
    rank -= __shfl_sync(~0u, to, 31);
  }
  // The same in all lanes already; from one lane's value, the compiler knows it.
  found.sequence = __shfl_sync(~0u, found.sequence, 0);
  found.row = __shfl_sync(~0u, found.row, 0);
  found.rows = __shfl_sync(~0u, found.rows, 0);
  found.position = __shfl_sync(~0u, found.position, 0);
  return found;
}

// A block's tiles; every round over the grid goes the other way, because later tiles are shorter.
__device__ __forceinline__ int TileIndex(int round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// A page's place in the order in which a tile's pages are taken: chunk after chunk, in a chunk stream after stream.
struct PagePlace {
  int page, chunk, stream;
  bool starts_stream, ends_stream, ends_chunk;

  __device__ __forceinline__ PagePlace(int place, int pages) {
    chunk = place / kChunkPages;
    const int in_chunk = place % kChunkPages, count = min(pages - chunk * kChunkPages, kChunkPages);
    const int steps = count / kStreams, longer = count % kStreams;  // the first `longer` streams have one page more
    const bool in_longer = in_chunk < longer * (steps + 1);
    const int length = in_longer ? steps + 1 : steps;
    const int in_streams = in_longer ? in_chunk : in_chunk - longer;  // as if all were of this length
    stream = (in_streams >= length) + (in_streams >= 2 * length) + (in_streams >= 3 * length);
    const int step = in_streams - stream * length;
    page = chunk * kChunkPages + step * kStreams + stream;
    starts_stream = step == 0;
    ends_stream = step + 1 == length;
    ends_chunk = in_chunk + 1 == count;
  }
};

// What the multiplying warpgroups do with a page: what its scores need, and what happens when it has been attended.
// At level 0 streams are folded into a chunk, at 1 chunks into a group, at 2 groups into the result.
struct PageStep {
  int first_token;
  uint32_t bits;

  static constexpr int kFollows = 3, kLast = 6, kFirst = 7, kStarts = 8, kMasked = 9;

  // Whether a part is finished that goes to this level.
  __device__ __forceinline__ bool Reaches(int level) const { return bits >> level & 1; }
  // Whether it is folded into something that is there already.
  __device__ __forceinline__ bool Follows(int level) const { return bits >> (kFollows + level) & 1; }
  __device__ __forceinline__ bool IsLast() const { return bits >> kLast & 1; }
  __device__ __forceinline__ bool IsFirst() const { return bits >> kFirst & 1; }
  // Whether it is the first of its stream.
  __device__ __forceinline__ bool Starts() const { return bits >> kStarts & 1; }
  // Whether some queries of a warpgroup do not see all of the page.
  __device__ __forceinline__ bool IsMasked(int warpgroup) const { return bits >> (kMasked + warpgroup) & 1; }
};

__device__ __forceinline__ PageStep StepAt(int place, const PagePlace& at, const Tile& tile, int group) {
  PageStep step = {at.page * kTokensPerPage, 0};
  const auto set = [&](int bit, bool value) { step.bits |= static_cast<uint32_t>(value) << bit; };
  set(0, at.ends_stream);
  set(1, at.ends_chunk);
  set(2, at.ends_chunk && (at.chunk + 1) % kGroupChunks == 0);
  set(PageStep::kFollows, at.stream != 0);
  set(PageStep::kFollows + 1, at.chunk % kGroupChunks != 0);
  set(PageStep::kFollows + 2, at.chunk >= kGroupChunks);
  set(PageStep::kLast, place + 1 == tile.pages());
  set(PageStep::kFirst, place == 0);
  set(PageStep::kStarts, at.starts_stream);
  for (int warpgroup = 0; warpgroup < kMultipliers; ++warpgroup) {
    set(PageStep::kMasked + warpgroup,
        step.first_token + kTokensPerPage - 1 > tile.position + warpgroup * 64 / group);
  }
  return step;
}

}  // namespace nibble::cuda
