#include "kernels/cuda/gemm_sm80/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

namespace nibble::cuda::sm80 {
namespace {

std::vector<GemmShape> Shapes() {
  std::vector<GemmShape> shapes;
  for (int64_t rows : {1, 16, 17, 64, 100, 256, 2048}) {
    shapes.push_back({10240, rows, 56, 8});
    shapes.push_back({8192, rows, 0, 224});
    shapes.push_back({1280, rows, 64, 0, 46});
    shapes.push_back({130, rows, 5, 3, 128});
    shapes.push_back({57344, rows, 54, 10});
  }
  shapes.push_back({1, 1, 1, 0});
  shapes.push_back({64, 1, 0, 1, 1});
  return shapes;
}

std::vector<WorkItem> ItemsOf(const WorkSplit& split, int worker) {
  std::vector<WorkItem> items;
  WorkItem item;
  for (Schedule schedule(split, worker); schedule.Next(split, &item);) items.push_back(item);
  return items;
}

int64_t PriceOf(const WorkSplit& split, const std::vector<WorkItem>& items) {
  int64_t price = 0;
  for (const WorkItem& item : items) price += split.PriceBefore(item.end) - split.PriceBefore(item.begin);
  return price;
}

TEST(GemmSm80PlanTest, EveryPlanCoversEveryStepOfEveryTileOnce) {
  for (const GemmShape& shape : Shapes()) {
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      const WorkSplit& split = plan.split;
      SCOPED_TRACE(PrintGemmPlan(plan));
      ASSERT_GE(split.workers, 1);
      ASSERT_LE(split.workers, shape.multiprocessors);
      ASSERT_GE(int64_t{split.row_tiles} * kTileRows, shape.n);
      ASSERT_GE(plan.PaddedTokens(), shape.rows);
      std::map<std::pair<int, int>, std::vector<int>> times;
      for (int worker = 0; worker < split.workers; ++worker) {
        for (const WorkItem& item : ItemsOf(split, worker)) {
          ASSERT_GE(item.begin, 0);
          ASSERT_LT(item.begin, item.end);
          ASSERT_LE(item.end, split.steps());
          ASSERT_LT(item.row_tile, split.row_tiles);
          ASSERT_LT(item.token_tile, split.token_tiles);
          std::vector<int>& of = times[{item.row_tile, item.token_tile}];
          of.resize(split.steps());
          for (int step = item.begin; step < item.end; ++step) ++of[step];
        }
      }
      ASSERT_EQ(static_cast<int>(times.size()), split.tiles());
      for (const auto& [tile, of] : times) {
        ASSERT_EQ(std::count(of.begin(), of.end(), 1), split.steps()) << tile.first << ", " << tile.second;
      }
    }
  }
}

// What the kernel relies on where it adds the sums of workers that share a tile.
TEST(GemmSm80PlanTest, SharersOfATileAreNeighboursAndOpenOneTileEach) {
  for (const GemmShape& shape : Shapes()) {
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      const WorkSplit& split = plan.split;
      SCOPED_TRACE(PrintGemmPlan(plan));
      std::map<int, std::set<int>> sharers;  // of a tile of the stream
      for (int worker = 0; worker < split.workers; ++worker) {
        int opened = 0, continued = 0;
        const std::vector<WorkItem> items = ItemsOf(split, worker);
        ASSERT_FALSE(items.empty()) << worker;
        for (const WorkItem& item : items) {
          ASSERT_EQ(item.stream < 0, item.end - item.begin == split.steps());
          if (item.stream < 0) continue;
          sharers[item.stream].insert(worker);
          (item.begin == 0 ? opened : continued) += 1;
        }
        ASSERT_LE(opened, 1);
        ASSERT_LE(continued, 1);
      }
      for (const auto& [tile, workers] : sharers) {
        const int64_t first = int64_t{tile} * split.steps();
        ASSERT_EQ(split.WorkerOf(first), *workers.begin());
        ASSERT_EQ(split.WorkerOf(first + split.steps() - 1), *workers.rbegin());
        ASSERT_EQ(*workers.rbegin() - *workers.begin() + 1, static_cast<int>(workers.size()));
        ASSERT_GT(plan.PartialBytes(), 0);
      }
    }
  }
}

// The point of pricing steps: parts of the stream take the same time, however 4- and 8-bit blocks are mixed.
TEST(GemmSm80PlanTest, PartsOfTheStreamDifferByLessThanTwoSteps) {
  for (const GemmShape& shape : Shapes()) {
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      const WorkSplit& split = plan.split;
      if (split.whole_tiles > 0 || split.stream_tiles() == 0) continue;
      const int64_t longest = std::max(split.four_bit_price, split.eight_bit_price);
      const double even = static_cast<double>(split.stream_price()) / split.workers;
      for (int worker = 0; worker < split.workers; ++worker) {
        ASSERT_LT(std::abs(static_cast<double>(PriceOf(split, ItemsOf(split, worker))) - even),
                  static_cast<double>(longest) + 1)
            << PrintGemmPlan(plan) << ", worker " << worker;
      }
    }
  }
}

TEST(GemmSm80PlanTest, EightBitStepsCostTwiceWhereMultiplyingDecides) {
  const GemmPlan many = PickGemmPlan({.n = 57344, .rows = 2048, .four_bit_blocks = 54, .eight_bit_blocks = 10});
  EXPECT_NEAR(many.split.eight_bit_price, 2 * many.split.four_bit_price, many.split.four_bit_price / 5);
  const GemmPlan few = PickGemmPlan({.n = 57344, .rows = 1, .four_bit_blocks = 54, .eight_bit_blocks = 10});
  EXPECT_NEAR(few.split.eight_bit_price, few.split.four_bit_price, few.split.four_bit_price / 5);
}

TEST(GemmSm80PlanTest, Golden) {
  const std::pair<GemmShape, const char*> golden[] = {
      {{10240, 1, 56, 8},
       "t16 stream: 80 tiles of 128 x 16, 56 4-bit and 8 8-bit blocks at 929:955, 0 whole, on 108 blocks"},
      {{10240, 64, 56, 8},
       "t64 stream: 80 tiles of 128 x 64, 56 4-bit and 8 8-bit blocks at 1006:1108, 0 whole, on 108 blocks"},
      {{10240, 2048, 56, 8},
       "t128 whole: 1280 tiles of 128 x 128, 56 4-bit and 8 8-bit blocks at 572:1084, 1280 whole, on 108 blocks"},
      {{8192, 16, 190, 34},
       "t16 stream: 64 tiles of 128 x 16, 190 4-bit and 34 8-bit blocks at 929:955, 0 whole, on 108 blocks"},
      {{57344, 128, 54, 10},
       "t128 tail: 448 tiles of 128 x 128, 54 4-bit and 10 8-bit blocks at 1108:1313, 324 whole, on 108 blocks"},
      {{8192, 256, 0, 64},
       "t128 stream: 128 tiles of 128 x 128, 0 4-bit and 64 8-bit blocks at 686:1084, 0 whole, on 108 blocks"},
      {{1280, 32, 64, 0, 46},
       "t16 stream: 20 tiles of 128 x 16, 64 4-bit and 0 8-bit blocks at 507:533, 0 whole, on 46 blocks"},
      {{64, 1, 1, 0, 128},
       "t16 whole: 1 tiles of 128 x 16, 1 4-bit and 0 8-bit blocks at 929:955, 1 whole, on 1 blocks"},
  };
  for (const auto& [shape, want] : golden) EXPECT_EQ(PrintGemmPlan(PickGemmPlan(shape)), want);
}

}  // namespace
}  // namespace nibble::cuda::sm80
