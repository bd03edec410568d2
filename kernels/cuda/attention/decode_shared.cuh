// What the warps of a decode block share, and the barriers between them; docs/kernels-attention.md shows the pipeline.
#pragma once

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/decode.h"
#include "kernels/cuda/attention/step_rows.cuh"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda {

// Warps 0 .. 3 compute a stream each, one walks the line of heads, one folds chunks.
inline constexpr int kWalkWarp = kStreams;
inline constexpr int kFoldWarp = kStreams + 1;
inline constexpr int kDecodeWarps = kStreams + 2;
inline constexpr int kDecodeThreads = kDecodeWarps * 32;
inline constexpr int kSlots = 2;      // pages in flight per stream
inline constexpr int kWorks = 4;      // chunks that the walk is ahead of the fold; and queries
inline constexpr int kDrawAhead = 2;  // and where shares are drawn; less than 2 would stop the streams
inline constexpr int kMerges = 2;     // chunks whose streams lie in shared memory to be folded
inline constexpr int kBlocksPerMultiprocessor = 2;
inline constexpr int kListedPartials = 16;  // that are combined at once
inline constexpr uint32_t kStartsGroup = 1u << 31;
inline constexpr int kTileHeads = 8;  // query heads of one tensor-core tile

struct DecodeParameters {
  StepView step;
  const uint8_t* pages;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_stride, out_stride;  // elements per row
  int kv_heads, group, tiles;    // query heads per KV head, and tiles of eight that they make
  DecodeRows rows;
  float scale_log2e;
  float4* partials;
  uint32_t* counters;  // chunks done of divided heads, by the block that begins one; behind them the number of draws
};

// What one warp or block holds of head sizes: D = 32 · words.
template <int kWords>
struct Sizes {
  static constexpr int kHeadDim = 32 * kWords;
  static constexpr int kHeadBytes = 64 * kHeadDim + 512;
  static constexpr int kVCodes = 32 * kHeadDim;
  static constexpr int kPageParameters = 64 * kHeadDim;
  static constexpr int kUnits = 2 * kWords * 32;              // quadruples of channels of eight heads
  static constexpr int kPartialFloat4 = kUnits + kTileHeads;  // accumulators, then (max, sum, zero, -) per head
  static constexpr int kQueryBytes = kWords * 32 * 16;
};

// A run of chunks of one head inside a share of the line.
struct Piece {
  int row, head, sequence, tokens;
  int begin, end;  // chunks
  int fresh_page;  // first page that this step's rows write
  int start;       // of the head on the line
  __device__ __forceinline__ int pages() const { return PagesOf(tokens); }
  __device__ __forceinline__ int cost() const { return HeadCost(pages()); }
};

// A head that was divided: one of its pieces, and the first block that has one.
struct DividedHead {
  Piece piece;
  int first_block;
};

// A chunk as the walk hands it to the streams and the fold.
struct ChunkWork {
  const uint8_t* pages[kChunkPages];
  int page_count;  // 0: there is no more work
  int tokens;      // of the context, from the chunk's first page on
  int fresh_page;  // of the chunk: first page that this step's rows write
  int query;       // number of the piece in this block
  Piece piece;
};

template <int kWords>
struct DecodeShared {
  using S = Sizes<kWords>;
  alignas(128) uint8_t ring[kStreams * kSlots * S::kHeadBytes];
  float4 merge[kMerges][kStreams][S::kPartialFloat4];  // streams of a chunk, each as a partial result is in memory
  alignas(16) uint8_t query[kWorks][S::kQueryBytes];
  QueryFactors factors[kWorks][kTileHeads];
  ChunkWork works[kWorks];
  uint64_t page_full[kStreams * kSlots];
  uint64_t work_full[kWorks];    // by the walk
  uint64_t work_empty[kWorks];   // by the fold
  uint64_t query_full[kWorks];   // by the walk
  uint64_t merge_full[kMerges];  // by the streams
  int scan_cost[kDecodeWarps], scan_chunks[kDecodeWarps];
  // Where the block's share and the drawn ones begin: row, and cost of the rows before it.
  int first_row[2], first_row_cost[2];
  uint32_t partial_list[kListedPartials];
  int partial_count;
  uint64_t partials_full;  // copies of partial results into the ring, once the streams are done
  DividedHead divided[2];  // that this block is to combine: of the piece it begins with, and of the one it ends with
  int divided_count;
};

// The n-th use of a barrier of a ring of kRing.
template <int kRing>
__device__ __forceinline__ void WaitTurn(const uint64_t* barriers, int n) {
  MbarrierWait(SharedAddress(barriers + n % kRing), n / kRing & 1);
}
template <int kRing>
__device__ __forceinline__ void ArriveTurn(const uint64_t* barriers, int n) {
  MbarrierArrive(SharedAddress(barriers + n % kRing));
}

}  // namespace nibble::cuda
