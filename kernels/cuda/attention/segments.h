// Where a context is cut, and how the chunks of all contexts of a step are shared out. Pure integer functions, the same
// on host and device.
//
// A "head" here is one (row, KV head) pair: the context of a row as one KV head sees it. The heads of a step lie one
// behind the other on a line of pages, and every block gets an equal piece of the line, each end moved to the nearest
// chunk boundary. So most groups and heads lie wholly inside one block and are folded there, and only what a cut divides
// goes through memory.
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

// The line of all heads of a step, cut into `blocks` pieces of `share` pages.
struct HeadLine {
  int pages = 0;
  int share = 1;
  int blocks = 0;

  NIBBLE_HOST_DEVICE int Cut(int block) const { return block < blocks ? block * share : pages; }
};

// A share is rounded up to whole chunks of average size, and to whole groups where that costs little: with contexts of
// equal length cuts then fall between groups or heads, and nothing needs to be combined.
NIBBLE_HOST_DEVICE constexpr HeadLine CutLine(int pages, int chunks, int max_blocks) {
  HeadLine line;
  line.pages = pages;
  if (pages == 0) return line;
  const int chunk = (pages + chunks - 1) / chunks, group = kChunkPages * kGroupChunks;
  const int share = (pages + max_blocks - 1) / max_blocks;
  line.share = (share + chunk - 1) / chunk * chunk;
  const int whole_groups = (share + group - 1) / group * group;
  if (chunk == kChunkPages && whole_groups - share <= share / 16) line.share = whole_groups;
  line.blocks = (pages + line.share - 1) / line.share;
  return line;
}

// The chunk boundary nearest to page `offset` of a head with `pages` pages: 0 .. ChunksOf(pages).
NIBBLE_HOST_DEVICE constexpr int ChunkBoundary(int offset, int pages) {
  const int chunks = ChunksOf(pages);
  if (offset <= 0) return 0;
  if (offset >= pages) return chunks;
  const int below = offset / kChunkPages, low = below * kChunkPages;
  const int high = low + kChunkPages < pages ? low + kChunkPages : pages;
  return offset - low < high - offset ? below : below + 1;
}

// Partial results of a piece [begin, end) of a head's chunks, in order: a chunk that does not start a group is one
// partial; a group, or its beginning, is one partial. Returns the end of the partial that starts at chunk `begin`.
NIBBLE_HOST_DEVICE constexpr int PartialEnd(int begin, int end) {
  if (begin % kGroupChunks != 0) return begin + 1;
  return begin + kGroupChunks < end ? begin + kGroupChunks : end;
}

// Most partials that one block writes: of the piece it begins with, and of the piece it ends with.
NIBBLE_HOST_DEVICE constexpr int MaxPartials(int max_pages) {
  return kGroupChunks - 1 + 2 * ((ChunksOf(max_pages) + kGroupChunks - 1) / kGroupChunks);
}

}  // namespace nibble::cuda
