// Which part of the output each worker computes, and in which order. A worker is a thread block, or a cluster. Pure
// integer arithmetic, the same on the host (plan.cc, tests) and in the kernel, where the copying warps and the
// multiplying ones walk it independently.
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_w4ax/config.h"

namespace nibble::cuda {

// n / value by a multiplication, exact where n · value < 2^32: in the kernel divisions would cost as much as a step.
struct Divisor {
  int value = 1;
  uint32_t factor = 0;  // 2^32 / value, rounded up; 0 for 1

  constexpr Divisor() = default;
  constexpr explicit Divisor(int v)
      : value(v), factor(v == 1 ? 0 : static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint64_t>(v) + 1)) {}
  NIBBLE_HOST_DEVICE constexpr int Quotient(int n) const {
    return factor == 0 ? n : static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * factor >> 32);
  }
};

// `count` things cut into `parts` that differ by at most one; parts <= count.
struct Parts {
  int length = 0;  // of a shorter part
  int longer = 0;  // parts that have one more: the first ones
  Divisor by_longer, by_shorter;

  constexpr Parts() = default;
  constexpr Parts(int count, int parts)
      : length(count / parts), longer(count % parts), by_longer(length + 1), by_shorter(length > 0 ? length : 1) {}
  NIBBLE_HOST_DEVICE constexpr int Begin(int part) const { return part * length + (part < longer ? part : longer); }
  // Which part thing `i` is in.
  NIBBLE_HOST_DEVICE constexpr int Of(int i) const {
    const int in_longer = longer * (length + 1);
    return i < in_longer ? by_longer.Quotient(i) : longer + by_shorter.Quotient(i - in_longer);
  }
};

// Tiles are numbered with the token tile running fastest, so that neighbours share weights in the L2 cache, and in groups
// of token tiles, so that the workers' tiles at one time are about as many rows as tokens, in bytes.
struct WorkSplit {
  int row_blocks = 0;   // of the weight
  int tile_blocks = 0;  // row blocks of a whole tile; the last tile along N may have fewer
  int token_tiles = 0;
  int tile_tokens = 0;  // of a tile: the tokens are shared evenly, so that no copy fetches much that is not there
  int group_tiles = 0;  // token tiles of a group; the last group may have fewer
  int steps = 0;        // along K
  int workers = 0;
  // even: every worker takes an even share of the (token tile, row block) pairs and never cuts K. Otherwise tiles
  // [0, whole_tiles) are dealt out in turn and the steps of the remaining ones are one stream that is cut into equal
  // parts (Stream-K, arXiv 2301.03598), each worker's part before its whole tiles.
  bool even = false;
  int whole_tiles = 0;

  // What follows from the above, see Prepare.
  Parts parts;  // of the pairs or of the stream, one for each worker
  Divisor by_steps, by_row_blocks, by_group, by_group_tiles, by_last_group_tiles;

  NIBBLE_HOST_DEVICE constexpr int row_tiles() const { return (row_blocks + tile_blocks - 1) / tile_blocks; }
  NIBBLE_HOST_DEVICE constexpr int tiles() const { return row_tiles() * token_tiles; }
  NIBBLE_HOST_DEVICE constexpr int stream_steps() const { return (tiles() - whole_tiles) * steps; }
  NIBBLE_HOST_DEVICE constexpr int pairs() const { return row_blocks * token_tiles; }

  constexpr void Prepare() {
    parts = Parts(even ? pairs() : stream_steps(), workers);
    by_steps = Divisor(steps);
    by_row_blocks = Divisor(row_blocks);
    by_group = Divisor(row_tiles() * group_tiles);
    by_group_tiles = Divisor(group_tiles);
    by_last_group_tiles = Divisor((token_tiles - 1) % group_tiles + 1);
  }
  // Whether every quotient that a schedule takes is exact.
  constexpr bool Divides() const {
    const int64_t most = int64_t{pairs()} > stream_steps() ? pairs() : stream_steps();
    const int64_t by = row_tiles() * group_tiles;
    return most * (parts.length + 1) < int64_t{1} << 32 && most * steps < int64_t{1} << 32 &&
           int64_t{pairs()} * row_blocks < int64_t{1} << 32 && tiles() * by < int64_t{1} << 32;
  }
};

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
  NIBBLE_HOST_DEVICE Schedule(const WorkSplit& split, int worker)
      : next_(split.parts.Begin(worker)), end_(split.parts.Begin(worker + 1)) {}

  // False when the worker is done.
  NIBBLE_HOST_DEVICE bool Next(const WorkSplit& split, int worker, WorkItem* item) {
    if (end_ >= 0 && next_ == end_) {
      next_ = worker;
      end_ = -1;
    }
    item->begin = 0;
    item->end = split.steps;
    item->stream = -1;
    if (end_ < 0) {
      if (split.even || next_ >= split.whole_tiles) return false;
      SetTile(split, next_, item);
      next_ += split.workers;
    } else if (split.even) {
      item->token_tile = split.by_row_blocks.Quotient(next_);
      item->row_block = next_ - item->token_tile * split.row_blocks;
      item->blocks = Min(end_ - next_, split.row_blocks - item->row_block, split.tile_blocks);
      next_ += item->blocks;
    } else {
      item->stream = split.by_steps.Quotient(next_);
      SetTile(split, split.whole_tiles + item->stream, item);
      item->begin = next_ - item->stream * split.steps;
      item->end = Min(split.steps, item->begin + end_ - next_, split.steps);
      next_ += item->end - item->begin;
    }
    return true;
  }

 private:
  NIBBLE_HOST_DEVICE static int Min(int a, int b, int c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }
  NIBBLE_HOST_DEVICE static void SetTile(const WorkSplit& split, int tile, WorkItem* item) {
    const int group = split.by_group.Quotient(tile), first = group * split.group_tiles;
    const int in_group = tile - group * split.by_group.value;
    const Divisor& by = first + split.group_tiles <= split.token_tiles ? split.by_group_tiles : split.by_last_group_tiles;
    const int row_tile = by.Quotient(in_group);
    item->token_tile = first + in_group - row_tile * by.value;
    item->row_block = row_tile * split.tile_blocks;
    const int left = split.row_blocks - item->row_block;
    item->blocks = left < split.tile_blocks ? left : split.tile_blocks;
  }

  int next_;  // pair (even) or step of the stream,
  int end_;   // up to here; then -1, and the next whole tile
};

}  // namespace nibble::cuda
