#include "kernels/cuda/gemm_w4ax/plan.h"

#include <algorithm>
#include <sstream>

#include "common/base/check.h"
#include "kernels/cuda/gemm_w4ax/kernel.h"

namespace nibble::cuda {
namespace {

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

GemmPlan MakePlan(const GemmShape& shape, int config_index) {
  const GemmConfig& config = kGemmConfigs[config_index];
  GemmPlan plan;
  plan.config = config_index;
  plan.split.row_blocks = static_cast<int>(W4AxRowBlocks(shape.n));
  plan.split.tile_blocks = config.row_blocks();
  plan.split.token_tiles = CeilDiv(shape.rows, config.tokens);
  plan.split.steps = CeilDiv(shape.k, kDepthBlock * config.depth_blocks());
  return plan;
}

}  // namespace

int64_t GemmPlan::PartialBytes() const {
  if (split.even || split.whole_tiles == split.tiles()) return 0;
  return int64_t{split.workers} * 2 * kConsumers * Config().sums() * 128 * 4;
}

std::vector<GemmPlan> EnumerateGemmPlans(const GemmShape& shape) {
  NIBBLE_CHECK(shape.rows > 0 && shape.n > 0 && shape.k > 0 && shape.k % kDepthBlock == 0 && shape.multiprocessors > 0,
               "a W4Ax linear of " + std::to_string(shape.rows) + " x " + std::to_string(shape.n) + " x " +
                   std::to_string(shape.k));
  std::vector<GemmPlan> plans;
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (config.tokens > 16 && config.tokens >= 2 * shape.rows) continue;
    GemmPlan plan = MakePlan(shape, i);
    WorkSplit& split = plan.split;
    const int slots =
        std::min(kMaxGemmWorkers, std::max(1, shape.multiprocessors * config.residents / config.cluster));
    // Whole tiles in turn.
    split.workers = std::min(slots, split.tiles());
    split.whole_tiles = split.tiles();
    plans.push_back(plan);
    if (split.tiles() % slots == 0) continue;  // nothing to even out
    // Whole waves, the last of them and the rest as a stream; or all of it as a stream.
    split.workers = std::min(slots, split.tiles() * split.steps);
    split.whole_tiles = std::max(0, split.tiles() / split.workers - 1) * split.workers;
    plans.push_back(plan);
    if (split.whole_tiles > 0) {
      split.whole_tiles = 0;
      plans.push_back(plan);
    }
    if (config.cluster == 1) {
      split.even = true;
      split.workers = std::min(slots, split.pairs());
      plans.push_back(plan);
    }
  }
  return plans;
}

// A launch is bound by whichever is slowest of reading weights from memory, bringing weights and activations from the
// L2 cache to the multiprocessors, and multiplying on the busiest multiprocessor; what is left of the others shows
// through in part. Constants are measured on an H200 (docs/kernels-gemm.md); only ratios between plans matter.
double PriceGemmPlan(const GemmShape& shape, const GemmPlan& plan) {
  constexpr double kMemoryBytesPerUs = 4.4e6;
  constexpr double kCacheBytesPerUs = 10.6e6;
  constexpr double kCyclesPerUs = 1750;
  constexpr double kMacsPerCycle = 4096;
  const GemmConfig& config = plan.Config();
  const WorkSplit& split = plan.split;
  const double blocks = double(split.row_blocks) * split.token_tiles;  // row blocks × token tiles
  const double depth = double(shape.k);
  // Of the busiest worker, in row blocks of a token tile.
  double most;
  if (split.even) {
    most = CeilDiv(static_cast<int64_t>(blocks), split.workers);
  } else if (split.whole_tiles == split.tiles()) {
    most = double(CeilDiv(split.tiles(), split.workers)) * split.tile_blocks;
  } else {
    most = blocks / split.workers;
  }
  const double workers_per_sm = std::max(1.0, double(plan.Grid()) / shape.multiprocessors) / config.cluster;
  const double macs = most * kRowBlock * config.tokens * depth * std::max(workers_per_sm, 1.0 / config.cluster);
  const double multiply = macs / kMacsPerCycle / kCyclesPerUs / 0.9;
  const double memory = double(split.row_blocks) * depth / kDepthBlock * kW4AxBlockBytes / kMemoryBytesPerUs;
  const double cache = (blocks / split.tile_blocks * config.tokens * depth + blocks * depth / kDepthBlock * kW4AxBlockBytes) /
                       kCacheBytesPerUs;
  const double slowest = std::max({multiply, memory, cache});
  const double rest = multiply + memory + cache - slowest;
  double fixed = config.residents > 1 ? 2.5 : 4.0;
  if (plan.PartialBytes() > 0) fixed += 2.5;
  return fixed + slowest + 0.15 * rest;
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
