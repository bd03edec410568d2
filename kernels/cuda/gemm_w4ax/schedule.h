// Which part of the output each worker computes, and in which order. A worker is a thread block, or a cluster. Pure
// integer arithmetic, the same on the host (plan.cc, tests) and in the kernel, where the copying warps and the
// multiplying ones walk it independently.
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_w4ax/config.h"

namespace nibble::cuda {

// Tiles are numbered with the token tile running fastest, so that neighbours share weights in the L2 cache.
struct WorkSplit {
  int row_blocks = 0;   // of the weight
  int tile_blocks = 0;  // row blocks of a whole tile; the last tile along N may have fewer
  int token_tiles = 0;
  int tile_tokens = 0;  // of a tile: the tokens are shared evenly, so that no copy fetches much that is not there
  int steps = 0;        // along K
  int workers = 0;
  // even: every worker takes an even share of the (token tile, row block) pairs and never cuts K. Otherwise tiles
  // [0, whole_tiles) are dealt out in turn and the steps of the remaining ones are one stream that is cut into equal
  // parts (Stream-K, arXiv 2301.03598), each worker's part before its whole tiles.
  bool even = false;
  int whole_tiles = 0;

  NIBBLE_HOST_DEVICE constexpr int tiles() const {
    return (row_blocks + tile_blocks - 1) / tile_blocks * token_tiles;
  }
  NIBBLE_HOST_DEVICE constexpr int stream_steps() const { return (tiles() - whole_tiles) * steps; }
  NIBBLE_HOST_DEVICE constexpr int pairs() const { return row_blocks * token_tiles; }
};

// Part `i` of 0..count-1 cut into `parts` that differ by at most one begins here; parts <= count.
NIBBLE_HOST_DEVICE constexpr int PartBegin(int count, int parts, int i) {
  const int longer = count % parts;
  return i * (count / parts) + (i < longer ? i : longer);
}
// Which part that is.
NIBBLE_HOST_DEVICE constexpr int PartOf(int count, int parts, int i) {
  const int length = count / parts, longer = count % parts;
  return i < longer * (length + 1) ? i / (length + 1) : longer + (i - longer * (length + 1)) / length;
}

struct WorkItem {
  int row_block = 0;
  int blocks = 0;
  int token_tile = 0;
  int begin = 0;   // steps along K
  int end = 0;
  int stream = -1;  // index of the tile in the stream, or -1
};

class Schedule {
 public:
  NIBBLE_HOST_DEVICE Schedule(const WorkSplit& split, int worker) : whole_(worker) {
    const int count = split.even ? split.pairs() : split.stream_steps();
    if (count == 0) return;
    next_ = PartBegin(count, split.workers, worker);
    end_ = PartBegin(count, split.workers, worker + 1);
  }

  // False when the worker is done.
  NIBBLE_HOST_DEVICE bool Next(const WorkSplit& split, WorkItem* item) {
    if (next_ >= end_) {
      if (split.even || whole_ >= split.whole_tiles) return false;
      SetTile(split, whole_, item);
      item->begin = 0;
      item->end = split.steps;
      item->stream = -1;
      whole_ += split.workers;
      return true;
    }
    if (split.even) {
      item->token_tile = next_ / split.row_blocks;
      item->row_block = next_ - item->token_tile * split.row_blocks;
      item->blocks = Min(end_ - next_, split.row_blocks - item->row_block, split.tile_blocks);
      item->begin = 0;
      item->end = split.steps;
      item->stream = -1;
      next_ += item->blocks;
      return true;
    }
    item->stream = next_ / split.steps;
    SetTile(split, split.whole_tiles + item->stream, item);
    item->begin = next_ - item->stream * split.steps;
    item->end = Min(split.steps, item->begin + end_ - next_, split.steps);
    next_ += item->end - item->begin;
    return true;
  }

 private:
  NIBBLE_HOST_DEVICE static int Min(int a, int b, int c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }
  NIBBLE_HOST_DEVICE static void SetTile(const WorkSplit& split, int tile, WorkItem* item) {
    const int row_tile = tile / split.token_tiles;
    item->token_tile = tile - row_tile * split.token_tiles;
    item->row_block = row_tile * split.tile_blocks;
    const int left = split.row_blocks - item->row_block;
    item->blocks = left < split.tile_blocks ? left : split.tile_blocks;
  }

  int next_ = 0;   // pairs (even) or steps of the stream
  int end_ = 0;
  int whole_ = 0;  // next whole tile
};

}  // namespace nibble::cuda
