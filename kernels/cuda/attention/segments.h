// Where a context is cut, and how the chunks of all contexts of a step are shared out. Pure integer functions, the same
// on host and device.
//
// A "head" here is one (row, KV head) pair: the context of a row as one KV head sees it. The heads of a step lie one
// behind the other on a line of pages; block i of n gets the piece of the line from i · pages / n to (i + 1) · pages / n,
// each end moved to the nearest chunk boundary. So every block gets about the same number of pages, most groups and
// heads lie wholly inside one block and are folded there, and only what a cut divides goes through memory.
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

// The line of all heads of a step, cut into `blocks` pieces.
struct HeadLine {
  int64_t pages = 0;
  int blocks = 1;

  NIBBLE_HOST_DEVICE int64_t Cut(int block) const {
    return static_cast<int64_t>(static_cast<uint64_t>(block) * static_cast<uint64_t>(pages) /
                                static_cast<uint32_t>(blocks));
  }
};

// The chunk boundary nearest to page `offset` of a head with `pages` pages: 0 .. ChunksOf(pages).
NIBBLE_HOST_DEVICE constexpr int ChunkBoundary(int64_t offset, int pages) {
  const int chunks = ChunksOf(pages);
  if (offset <= 0) return 0;
  if (offset >= pages) return chunks;
  const int page = static_cast<int>(offset);
  const int below = page / kChunkPages, low = below * kChunkPages;
  const int high = low + kChunkPages < pages ? low + kChunkPages : pages;
  return page - low < high - page ? below : below + 1;
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
