#include "kernels/cuda/gemm_sm80/plan.h"

#include <algorithm>
#include <sstream>

#include "common/base/check.h"

namespace nibble::cuda::sm80 {
namespace {

// Of one multiprocessor and clock cycle, A100's data sheet: 1248 dense INT4 and 624 INT8 TOPS, 1.55 TB/s, 108
// multiprocessors at 1410 MHz. The L2 cache's share is an estimate. Ada and the smaller Amperes have other rates in
// much the same proportions.
constexpr int kFourBitMacs = 4096;
constexpr int kEightBitMacs = 2048;
constexpr int kMemoryBytes = 10;
constexpr int kCacheBytes = 40;

constexpr int kStepOverhead = 60;     // a barrier and the addresses
constexpr int kTileOverhead = 2500;   // the pipeline's fill, and the epilogue
constexpr int kStreamOverhead = 2000;  // leaving sums, and waiting for them to be seen

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Clock cycles of a step with the block's activations in `units` units: multiplying, or loading if that is longer.
int StepPrice(const GemmConfig& config, int units, int token_tiles) {
  const int macs = kTileRows * config.tokens * kDepthBlock / (units == 1 ? kFourBitMacs : kEightBitMacs);
  // Weights come from memory for the first of the token tiles and from the L2 cache for the others.
  const int load = kWeightBlockBytes / std::min(kCacheBytes, kMemoryBytes * token_tiles) +
                   units * kUnitBytes * config.tokens / kCacheBytes;
  return kStepOverhead + std::max(macs, load);
}

}  // namespace

int64_t GemmPlan::PartialBytes() const {
  return split.stream_tiles() == 0 ? 0 : int64_t{split.workers} * 2 * kTileRows * Config().tokens * 4;
}

std::vector<GemmPlan> EnumerateGemmPlans(const GemmShape& shape) {
  NIBBLE_CHECK(shape.rows > 0 && shape.n > 0 && shape.four_bit_blocks >= 0 && shape.eight_bit_blocks >= 0 &&
                   shape.k() > 0 && shape.multiprocessors > 0,
               "a W4Ax linear of " + std::to_string(shape.rows) + " x " + std::to_string(shape.n) + " x " +
                   std::to_string(shape.k()));
  std::vector<GemmPlan> plans;
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (i > 0 && kGemmConfigs[i - 1].tokens >= shape.rows) break;
    GemmPlan plan;
    plan.config = i;
    WorkSplit& split = plan.split;
    split.row_tiles = CeilDiv(shape.n, kTileRows);
    split.token_tiles = CeilDiv(shape.rows, config.tokens);
    split.four_bit_steps = static_cast<int>(shape.four_bit_blocks);
    split.eight_bit_steps = static_cast<int>(shape.eight_bit_blocks);
    split.four_bit_price = StepPrice(config, 1, split.token_tiles);
    split.eight_bit_price = StepPrice(config, 2, split.token_tiles);
    split.workers = std::min(shape.multiprocessors, split.tiles());
    split.whole_tiles = split.tiles();
    plans.push_back(plan);
    if (split.tiles() % shape.multiprocessors == 0) continue;  // nothing to even out
    // The last whole wave and what is left after it as a stream. A part is no shorter than the longest step, so that
    // none is empty.
    split.whole_tiles = std::max(0, split.tiles() / shape.multiprocessors - 1) * shape.multiprocessors;
    const int64_t longest = split.eight_bit_steps > 0 ? split.eight_bit_price : split.four_bit_price;
    split.workers = static_cast<int>(std::min<int64_t>(shape.multiprocessors, split.stream_price() / longest));
    if (split.whole_tiles > 0 && split.workers < shape.multiprocessors) continue;
    plans.push_back(plan);
  }
  return plans;
}

double PriceGemmPlan(const GemmPlan& plan) {
  const WorkSplit& split = plan.split;
  const double tile = static_cast<double>(split.tile_price());
  const int whole = CeilDiv(split.whole_tiles, split.workers);
  double price = whole * (tile + kTileOverhead);
  if (split.stream_tiles() > 0) {
    const double part = static_cast<double>(split.stream_price()) / split.workers;
    const double sharers = 1 + static_cast<double>(split.workers) / split.stream_tiles();
    const double exchanged = kTileRows * plan.Config().tokens * 4.0 / kCacheBytes;
    price += part + (1 + part / tile) * kTileOverhead + kStreamOverhead + sharers * exchanged;
  }
  return price;
}

GemmPlan PickGemmPlan(const GemmShape& shape) {
  GemmPlan best;
  double best_price = 0;
  for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
    const double price = PriceGemmPlan(plan);
    if (best.config < 0 || price < best_price) {
      best = plan;
      best_price = price;
    }
  }
  return best;
}

std::string PrintGemmPlan(const GemmPlan& plan) {
  const WorkSplit& split = plan.split;
  std::ostringstream out;
  out << plan.Config().name
      << (split.stream_tiles() == 0 ? " whole: " : split.whole_tiles > 0 ? " tail: " : " stream: ") << split.tiles()
      << " tiles of " << kTileRows << " x " << plan.Config().tokens << ", " << split.four_bit_steps << " 4-bit and "
      << split.eight_bit_steps << " 8-bit blocks at " << split.four_bit_price << ":" << split.eight_bit_price << ", "
      << split.whole_tiles << " whole, on " << split.workers << " blocks";
  return out.str();
}

}  // namespace nibble::cuda::sm80
