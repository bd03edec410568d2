// Where a context is cut, and how the chunks of all contexts of a step are shared out. Pure integer functions, the same
// on host and device.
//
// A "head" here is one (row, KV head) pair: the context of a row as one KV head sees it. The heads of a step lie one
// behind the other on a line, each as long as it costs, and every block gets an equal share of the line, each end moved
// to the nearest chunk boundary. So most groups and heads lie wholly inside one block and are folded there, and only
// what a cut divides goes through memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/kv_page.h"

namespace nibble::cuda {

inline constexpr int kStreams = 4;       // chains of pages in a chunk
inline constexpr int kStreamPages = 4;   // pages of a chain
inline constexpr int kChunkPages = kStreams * kStreamPages;
inline constexpr int kGroupChunks = 4;   // chunks folded before groups are

NIBBLE_HOST_DEVICE constexpr int PagesOf(int tokens) { return (tokens + kTokensPerPage - 1) / kTokensPerPage; }
NIBBLE_HOST_DEVICE constexpr int ChunksOf(int pages) { return (pages + kChunkPages - 1) / kChunkPages; }

// Cost of a chunk, in pages: its streams run side by side and the longest decides. Folding them costs nothing, as the
// next chunk runs meanwhile.
inline constexpr int kChunkCost = kChunkPages;
NIBBLE_HOST_DEVICE constexpr int HeadCost(int pages) { return (pages + kStreams - 1) / kStreams * kStreams; }

// The line of all heads of a step: first a share for each of `blocks` blocks, then `drawn` short ones, which blocks
// draw one after the other when they have nothing else to do.
inline constexpr int kDrawnCost = kChunkCost;
struct HeadLine {
  int cost = 0;
  int share = 1;
  int blocks = 0;
  int drawn = 0;

  NIBBLE_HOST_DEVICE int DrawnBegin() const { return blocks * share; }
  // Where share s begins; s may be the number of shares.
  NIBBLE_HOST_DEVICE int Cut(int s) const {
    if (s >= blocks + drawn) return cost;
    return s <= blocks ? s * share : DrawnBegin() + (s - blocks) * kDrawnCost;
  }
};

// A share is rounded up to whole chunks of average cost, and to whole groups where that costs little: with contexts of
// equal length cuts then fall between groups or heads, and nothing needs to be combined. Where no head can be divided,
// since all are `single_chunks`, blocks get about one chunk less than an even share each, and draw the rest.
inline constexpr int kDrawFrom = 2;  // chunks in an even share
NIBBLE_HOST_DEVICE constexpr HeadLine CutLine(int cost, int chunks, bool single_chunks, int max_blocks) {
  HeadLine line;
  line.cost = cost;
  if (cost == 0) return line;
  const int chunk = (cost + chunks - 1) / chunks, group = kChunkCost * kGroupChunks;
  const int share = (cost + max_blocks - 1) / max_blocks;
  if (single_chunks && share >= kDrawFrom * kChunkCost) {
    line.share = share - kChunkCost;
    if (chunk == kChunkCost) line.share = line.share / kChunkCost * kChunkCost;
    line.blocks = max_blocks;
    line.drawn = (cost - line.DrawnBegin() + kDrawnCost - 1) / kDrawnCost;
    return line;
  }
  line.share = chunk == kChunkCost || share < chunk ? (share + chunk - 1) / chunk * chunk : share;
  const int whole_groups = (share + group - 1) / group * group;
  if (chunk == kChunkCost && whole_groups - share <= share / 16) line.share = whole_groups;
  line.blocks = (cost + line.share - 1) / line.share;
  return line;
}

// The chunk boundary nearest to place `offset` of a head with `pages` pages: 0 .. ChunksOf(pages).
NIBBLE_HOST_DEVICE constexpr int ChunkBoundary(int offset, int pages) {
  const int cost = HeadCost(pages);
  if (offset <= 0) return 0;
  if (offset >= cost) return ChunksOf(pages);
  const int below = offset / kChunkCost, low = below * kChunkCost;
  const int high = low + kChunkCost < cost ? low + kChunkCost : cost;
  return offset - low < high - offset ? below : below + 1;
}

// Partial results of a piece [begin, end) of a head's chunks, in order: a chunk that does not start a group is one
// partial; a group, or its beginning, is one partial. Returns the end of the partial that starts at chunk `begin`.
NIBBLE_HOST_DEVICE constexpr int PartialEnd(int begin, int end) {
  if (begin % kGroupChunks != 0) return begin + 1;
  return begin + kGroupChunks < end ? begin + kGroupChunks : end;
}

// How many partials [begin, end) makes.
NIBBLE_HOST_DEVICE constexpr int PartialCount(int begin, int end) {
  const int aligned = (begin + kGroupChunks - 1) / kGroupChunks * kGroupChunks;
  if (end <= aligned) return end - begin;
  return aligned - begin + (end - aligned + kGroupChunks - 1) / kGroupChunks;
}

// Most partials of a block: the total of the groups of a head that it has whole; those of the piece it begins with, and
// of the piece it ends with.
NIBBLE_HOST_DEVICE constexpr int MaxPartials(int max_pages) {
  return kGroupChunks + 2 * ((ChunksOf(max_pages) + kGroupChunks - 1) / kGroupChunks);
}

// Numbers of a block's partials: the total's, and the first of a piece of a divided head, where that of the piece which
// begins inside a head comes first and the other's at the end.
NIBBLE_HOST_DEVICE constexpr int TotalPartial(int block, int max_pages) { return block * MaxPartials(max_pages); }
NIBBLE_HOST_DEVICE constexpr int FirstPartial(int block, bool begins_inside, int max_pages) {
  if (begins_inside) return TotalPartial(block, max_pages) + 1;
  return TotalPartial(block + 1, max_pages) - (ChunksOf(max_pages) + kGroupChunks - 1) / kGroupChunks;
}

}  // namespace nibble::cuda
