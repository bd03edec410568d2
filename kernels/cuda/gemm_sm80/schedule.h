// Which part of the output each thread block computes, and in which order. Pure integer arithmetic, the same on the host
// (plan.cc, tests) and in the kernel.
//
// All tiles have the same steps along K: first those of the 4-bit blocks, then those of the 8-bit ones, which take about
// twice as long. COMET (arXiv 2410.12168, section 4) deals tiles of both kinds out so that every multiprocessor gets
// the same mix, and decomposes the tiles of the last wave. Here a tile is a line of priced steps: whole tiles, whose mix
// is the same, go round, and the lines of the remaining ones are joined and cut into parts of equal price (Stream-K,
// arXiv 2301.03598, over prices instead of steps).
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_sm80/config.h"

namespace nibble::cuda::sm80 {

// Tiles are numbered with the token tile running fastest, so that neighbours share weights in the L2 cache.
struct WorkSplit {
  int row_tiles = 0;
  int token_tiles = 0;
  int four_bit_steps = 0;
  int eight_bit_steps = 0;
  int four_bit_price = 1;
  int eight_bit_price = 2;
  int workers = 0;      // thread blocks
  int whole_tiles = 0;  // tiles [0, whole_tiles) are dealt out in turn, the others are the stream

  NIBBLE_HOST_DEVICE constexpr int tiles() const { return row_tiles * token_tiles; }
  NIBBLE_HOST_DEVICE constexpr int stream_tiles() const { return tiles() - whole_tiles; }
  NIBBLE_HOST_DEVICE constexpr int steps() const { return four_bit_steps + eight_bit_steps; }
  NIBBLE_HOST_DEVICE constexpr int64_t tile_price() const { return PriceBefore(steps()); }
  NIBBLE_HOST_DEVICE constexpr int64_t stream_price() const { return stream_tiles() * tile_price(); }

  // Price of the first `step` steps of a tile.
  NIBBLE_HOST_DEVICE constexpr int64_t PriceBefore(int step) const {
    return step <= four_bit_steps ? int64_t{step} * four_bit_price
                                  : int64_t{four_bit_steps} * four_bit_price +
                                        int64_t{step - four_bit_steps} * eight_bit_price;
  }
  // A worker's part of the stream begins with the first step that begins at or after its share of the price. Steps of
  // the stream are numbered tile after tile.
  NIBBLE_HOST_DEVICE constexpr int64_t PartBegin(int worker) const {
    const int64_t price = stream_price() * worker / workers, tile = price / tile_price();
    const int64_t rest = price - tile * tile_price(), four_bit = PriceBefore(four_bit_steps);
    const int64_t step = rest <= four_bit
                             ? (rest + four_bit_price - 1) / four_bit_price
                             : four_bit_steps + (rest - four_bit + eight_bit_price - 1) / eight_bit_price;
    return tile * steps() + step;
  }
  // Whose part a step of the stream is in.
  NIBBLE_HOST_DEVICE constexpr int WorkerOf(int64_t step) const {
    const int64_t price = step / steps() * tile_price() + PriceBefore(static_cast<int>(step % steps()));
    return static_cast<int>(((price + 1) * workers - 1) / stream_price());
  }
};

struct WorkItem {
  int row_tile = 0;
  int token_tile = 0;
  int begin = 0;  // steps along K
  int end = 0;
  int stream = -1;  // index of the tile in the stream when others share it, else -1
};

// A worker's items: its part of the stream, then its whole tiles.
class Schedule {
 public:
  NIBBLE_HOST_DEVICE constexpr Schedule(const WorkSplit& split, int worker)
      : at_(split.stream_tiles() > 0 ? split.PartBegin(worker) : 0),
        end_(split.stream_tiles() > 0 ? split.PartBegin(worker + 1) : 0),
        tile_(worker) {}

  NIBBLE_HOST_DEVICE constexpr bool Next(const WorkSplit& split, WorkItem* item) {
    if (at_ < end_) {
      const int steps = split.steps(), stream = static_cast<int>(at_ / steps);
      const int64_t first = int64_t{stream} * steps;
      Place(split, split.whole_tiles + stream, item);
      item->begin = static_cast<int>(at_ - first);
      item->end = end_ - first < steps ? static_cast<int>(end_ - first) : steps;
      item->stream = item->end - item->begin == steps ? -1 : stream;
      at_ = first + item->end;
      return true;
    }
    if (tile_ >= split.whole_tiles) return false;
    Place(split, tile_, item);
    item->begin = 0;
    item->end = split.steps();
    item->stream = -1;
    tile_ += split.workers;
    return true;
  }

 private:
  NIBBLE_HOST_DEVICE static constexpr void Place(const WorkSplit& split, int tile, WorkItem* item) {
    item->row_tile = tile / split.token_tiles;
    item->token_tile = tile % split.token_tiles;
  }

  int64_t at_, end_;
  int tile_;
};

}  // namespace nibble::cuda::sm80
