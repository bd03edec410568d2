#include "kernels/cuda/gemm_w4ax/plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "common/base/check.h"
#include "kernels/cuda/gemm_w4ax/kernel.h"

namespace nibble::cuda {
namespace {

// Tiles of few tokens are for few tokens: more of them than this read weights too often.
constexpr int kMostNarrowTiles = 16;

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// At most: what the device runs at one time.
int Workers(const GemmShape& shape, const GemmConfig& config) {
  return std::min(kMaxGemmWorkers, std::max(1, shape.multiprocessors * config.residents / config.cluster));
}

GemmPlan MakePlan(const GemmShape& shape, int config_index) {
  const GemmConfig& config = kGemmConfigs[config_index];
  GemmPlan plan;
  plan.config = config_index;
  plan.split.row_blocks = static_cast<int>(W4AxRowBlocks(shape.n));
  plan.split.tile_blocks = config.row_blocks();
  plan.split.token_tiles = CeilDiv(shape.rows, config.tokens);
  plan.split.tile_tokens = CeilDiv(shape.rows, plan.split.token_tiles);
  // What the workers read at one time is least when their token tiles are as many bytes as their row tiles.
  const double row_bytes = double(config.rows()) / kRowBlock * kW4AxBlockBytes;
  const double token_bytes = kDepthBlock * plan.split.tile_tokens;
  const double balanced = std::sqrt(Workers(shape, config) * row_bytes / token_bytes);
  const int groups = CeilDiv(plan.split.token_tiles, static_cast<int64_t>(std::ceil(balanced)));
  plan.split.group_tiles = CeilDiv(plan.split.token_tiles, groups);
  plan.split.steps = CeilDiv(shape.k, kDepthBlock * config.depth_blocks());
  return plan;
}

// What the workers read while each computes one tile.
double WaveBytes(const WorkSplit& split) {
  const int row_tiles = std::min(split.row_tiles(), CeilDiv(split.workers, split.group_tiles));
  return double(split.steps) * kDepthBlock * split.group_tiles * split.tile_tokens +
         double(split.steps) * row_tiles * split.tile_blocks * kW4AxBlockBytes;
}

}  // namespace

int64_t GemmPlan::PartialBytes() const {
  if (split.even || split.whole_tiles == split.tiles()) return 0;
  return int64_t{split.workers} * Config().partial_bytes();
}

std::vector<GemmPlan> EnumerateGemmPlans(const GemmShape& shape) {
  NIBBLE_CHECK(shape.rows > 0 && shape.n > 0 && shape.k > 0 && shape.k % kDepthBlock == 0 && shape.multiprocessors > 0,
               "a W4Ax linear of " + std::to_string(shape.rows) + " x " + std::to_string(shape.n) + " x " +
                   std::to_string(shape.k));
  std::vector<GemmPlan> plans;
  const auto add = [&](GemmPlan plan) {
    plan.split.Prepare();
    NIBBLE_CHECK(plan.split.Divides(), PrintGemmPlan(plan));
    plans.push_back(plan);
  };
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (config.tokens > 16 && config.tokens >= 2 * shape.rows) continue;
    GemmPlan plan = MakePlan(shape, i);
    WorkSplit& split = plan.split;
    // Two blocks on a multiprocessor help where they are more than there are multiprocessors.
    if (config.residents > 1 && split.tiles() <= shape.multiprocessors) continue;
    if (split.token_tiles > kMostNarrowTiles && config.tokens < 128) continue;
    const int slots = Workers(shape, config);
    // Whole tiles in turn.
    split.workers = std::min(slots, split.tiles());
    split.whole_tiles = split.tiles();
    add(plan);
    if (!config.streams() || split.tiles() % slots == 0) continue;  // little to even out
    // The last whole wave and what is left after it as a stream.
    split.workers = std::min(slots, split.tiles() * split.steps);
    split.whole_tiles = std::max(0, split.tiles() / split.workers - 1) * split.workers;
    add(plan);
    if (!config.halves_depth() && !config.shares_depth) {
      split.even = true;
      split.workers = std::min(slots, split.pairs());
      add(plan);
    }
  }
  return plans;
}

// The busiest worker's steps and tiles at what its configuration takes for them, or the time to read the weights and
// finish the last tile if that is longer; and for tiles whose K is cut, a fixed latency and the sums that their workers
// leave and fetch. Workers of a stream are at different depths: what their tiles share is read again where the L2 cache
// does not hold all of it.
double PriceGemmPlan(const GemmShape& shape, const GemmPlan& plan) {
  constexpr double kLaunchUs = 1.26, kFirstBytesUs = 1.45, kMemoryBytesPerUs = 4.5e6;
  constexpr double kStreamUs = 1.5, kSumUs = 0.0098;  // per sum of a thread and worker of a tile
  constexpr double kCacheBytes = 50e6, kApart = 1.05;
  const GemmConfig& config = plan.Config();
  const WorkSplit& split = plan.split;
  auto step_us = [&](int blocks) {
    if (split.tile_blocks == 1) return config.step_us;
    return config.one_block_step_us +
           (config.step_us - config.one_block_step_us) * (blocks - 1) / (split.tile_blocks - 1);
  };
  double steps_us, tiles, stream_us = 0;
  if (split.even) {
    const int most = CeilDiv(split.pairs(), split.workers);
    // Some share goes on from one token tile to the next, unless shares divide the rows.
    const bool straddles = split.token_tiles > 1 && most > 1 && split.row_blocks % most != 0;
    tiles = CeilDiv(most, split.tile_blocks) + (straddles ? 1 : 0);
    auto share_us = [&](int blocks) {
      const int rest = blocks % split.tile_blocks;
      return blocks / split.tile_blocks * config.step_us + (rest > 0 ? step_us(rest) : 0.0);
    };
    steps_us = split.steps * (straddles ? share_us(1) + share_us(most - 1) : share_us(most));
  } else {
    const int blocks = std::min(split.tile_blocks, split.row_blocks);
    tiles = CeilDiv(split.whole_tiles, split.workers);
    double steps = tiles * split.steps;
    const int stream_tiles = split.tiles() - split.whole_tiles;
    if (stream_tiles > 0) {
      const double part = double(split.stream_steps()) / split.workers;
      const double sharers = 1 + double(split.workers) / stream_tiles;
      steps += part;
      tiles += 1 + part / split.steps;
      stream_us = kStreamUs + kSumUs * sharers * config.sums();
    }
    steps_us = steps * step_us(blocks) / (config.halves_depth() ? 2 : 1);
    if (stream_tiles > 0 && split.token_tiles > 1 && WaveBytes(split) > kCacheBytes) steps_us *= kApart;
  }
  const double memory_us =
      kFirstBytesUs + double(split.row_blocks) * CeilDiv(shape.k, kDepthBlock) * kW4AxBlockBytes / kMemoryBytesPerUs;
  return kLaunchUs + std::max(steps_us + tiles * config.tile_us, memory_us + config.tile_us) + stream_us;
}

GemmPlan PickGemmPlan(const GemmShape& shape) {
  GemmPlan best;
  double best_price = 0;
  for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
    const double price = PriceGemmPlan(shape, plan);
    if (best.config < 0 || price < best_price) {
      best = plan;
      best_price = price;
    }
  }
  return best;
}

std::string PrintGemmPlan(const GemmPlan& plan) {
  const GemmConfig& config = plan.Config();
  const WorkSplit& split = plan.split;
  std::ostringstream out;
  out << config.name;
  if (split.even) {
    out << " even: " << split.row_blocks << " x " << split.token_tiles << " blocks of 64 x " << config.tokens;
  } else {
    out << (split.whole_tiles == split.tiles() ? " whole: " : split.whole_tiles > 0 ? " tail: " : " stream: ")
        << split.tiles() << " tiles of " << config.rows() << " x " << config.tokens;
  }
  out << " on " << split.workers << (config.cluster > 1 ? " clusters" : " blocks");
  return out.str();
}

}  // namespace nibble::cuda
