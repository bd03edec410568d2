#include "kernels/cuda/gemm_w4ax/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "kernels/cuda/gemm_w4ax/kernel.h"

namespace nibble::cuda {
namespace {

const std::vector<GemmShape> kShapes = {
    {1, 128, 1},         {17, 256, 3},         {130, 768, 200},      {64, 128, 16384},    {3072, 512, 5},
    {512, 1536, 40},     {10240, 8192, 16},    {10240, 8192, 100},   {8192, 8192, 64},    {57344, 8192, 128},
    {8192, 28672, 256},  {1280, 8192, 33},     {8192, 1024, 1},      {6144, 4096, 1000},  {10240, 8192, 256, 114},
    {4096, 14336, 7, 7}, {128256, 8192, 32, 1}, {28672, 4096, 16384},
};

std::vector<WorkItem> ItemsOf(const WorkSplit& split, int worker) {
  std::vector<WorkItem> items;
  WorkItem item;
  for (Schedule schedule(split, worker); schedule.Next(split, worker, &item);) items.push_back(item);
  return items;
}

TEST(GemmPlanTest, QuotientsAreExact) {
  for (int value : {1, 2, 3, 5, 7, 31, 64, 66, 132, 133, 224, 641, 896, 3584, 65535}) {
    const Divisor divisor(value);
    const int64_t most = std::min<int64_t>((int64_t{1} << 32) / value - 1, INT32_MAX);
    for (int64_t multiple : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1000}, most / value - 1, most / value}) {
      for (int64_t n : {multiple * value - 1, multiple * value, multiple * value + 1}) {
        if (n < 0 || n > most) continue;
        ASSERT_EQ(divisor.Quotient(static_cast<int>(n)), n / value) << n << " / " << value;
      }
    }
  }
}

TEST(GemmPlanTest, PartsAreContiguousAndDifferByAtMostOne) {
  for (int count : {1, 2, 7, 64, 131, 132, 133, 1000}) {
    for (int parts = 1; parts <= count && parts <= 140; ++parts) {
      const Parts cut(count, parts);
      EXPECT_EQ(cut.Begin(0), 0);
      EXPECT_EQ(cut.Begin(parts), count);
      for (int i = 0; i < parts; ++i) {
        const int begin = cut.Begin(i), end = cut.Begin(i + 1);
        ASSERT_TRUE(end - begin == count / parts || end - begin == count / parts + 1) << count << " " << parts;
        for (int at : {begin, end - 1}) ASSERT_EQ(cut.Of(at), i) << at << " of " << count;
      }
    }
  }
}

TEST(GemmPlanTest, EveryPlanCoversEveryStepOfEveryBlockOnce) {
  for (const GemmShape& shape : kShapes) {
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      const WorkSplit& split = plan.split;
      SCOPED_TRACE(PrintGemmPlan(plan));
      ASSERT_GE(split.workers, 1);
      ASSERT_LE(split.workers, kMaxGemmWorkers);
      ASSERT_GE(split.row_blocks * kRowBlock, shape.n);
      ASSERT_GE(int64_t{split.token_tiles} * plan.Config().tokens, shape.rows);
      ASSERT_EQ(split.tile_blocks, plan.Config().row_blocks());
      std::map<std::pair<int, int>, int> steps;  // of a (row block, token tile)
      for (int worker = 0; worker < split.workers; ++worker) {
        for (const WorkItem& item : ItemsOf(split, worker)) {
          ASSERT_GE(item.begin, 0);
          ASSERT_LT(item.begin, item.end);
          ASSERT_LE(item.end, split.steps);
          ASSERT_GE(item.blocks, 1);
          ASSERT_LE(item.blocks, split.tile_blocks);
          for (int i = 0; i < item.blocks; ++i) steps[{item.row_block + i, item.token_tile}] += item.end - item.begin;
        }
      }
      ASSERT_EQ(static_cast<int>(steps.size()), split.pairs());
      for (const auto& [pair, count] : steps) {
        ASSERT_LT(pair.first, split.row_blocks);
        ASSERT_LT(pair.second, split.token_tiles);
        ASSERT_EQ(count, split.steps) << "row block " << pair.first << ", token tile " << pair.second;
      }
    }
  }
}

// What the kernel relies on where it adds the sums of workers that share a tile.
TEST(GemmPlanTest, WorkersOfASharedTileAreNeighboursAndOpenOneTileEach) {
  for (const GemmShape& shape : kShapes) {
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      const WorkSplit& split = plan.split;
      SCOPED_TRACE(PrintGemmPlan(plan));
      std::map<int, std::set<int>> sharers;  // of a tile of the stream
      for (int worker = 0; worker < split.workers; ++worker) {
        int opened = 0, continued = 0;
        for (const WorkItem& item : ItemsOf(split, worker)) {
          if (item.end - item.begin == split.steps) continue;
          ASSERT_FALSE(split.even);
          ASSERT_GE(item.stream, 0);
          sharers[item.stream].insert(worker);
          (item.begin == 0 ? opened : continued) += 1;
        }
        ASSERT_LE(opened, 1);
        ASSERT_LE(continued, 1);
      }
      for (const auto& [tile, workers] : sharers) {
        ASSERT_EQ(split.parts.Of(tile * split.steps), *workers.begin());
        ASSERT_EQ(split.parts.Of((tile + 1) * split.steps - 1), *workers.rbegin());
        ASSERT_EQ(*workers.rbegin() - *workers.begin() + 1, static_cast<int>(workers.size()));
        ASSERT_GT(plan.PartialBytes(), 0);
      }
    }
  }
}

// Changes of prices or configurations show here.
TEST(GemmPlanTest, PicksForLlama70B) {
  const auto pick = [](int64_t n, int64_t k, int64_t rows) { return PrintGemmPlan(PickGemmPlan({n, k, rows})); };
  EXPECT_EQ(pick(10240, 8192, 1), "e16 stream: 160 tiles of 64 x 16 on 132 blocks");
  EXPECT_EQ(pick(10240, 8192, 32), "e32 stream: 160 tiles of 64 x 32 on 132 blocks");
  EXPECT_EQ(pick(10240, 8192, 64), "e64 stream: 160 tiles of 64 x 64 on 132 blocks");
  EXPECT_EQ(pick(10240, 8192, 128), "r128 stream: 80 tiles of 128 x 128 on 132 blocks");
  EXPECT_EQ(pick(10240, 8192, 256), "r256 stream: 80 tiles of 128 x 256 on 132 blocks");
  EXPECT_EQ(pick(10240, 8192, 512), "m256 stream: 80 tiles of 256 x 256 on 66 clusters");
  EXPECT_EQ(pick(8192, 8192, 16), "e16 whole: 128 tiles of 64 x 16 on 128 blocks");
  EXPECT_EQ(pick(8192, 8192, 64), "e64 whole: 128 tiles of 64 x 64 on 128 blocks");
  EXPECT_EQ(pick(8192, 8192, 128), "d128 whole: 128 tiles of 64 x 128 on 128 blocks");
  EXPECT_EQ(pick(8192, 8192, 256), "r256 even: 128 x 1 blocks of 64 x 256 on 128 blocks");
  EXPECT_EQ(pick(57344, 8192, 16), "e16 whole: 896 tiles of 64 x 16 on 132 blocks");
  EXPECT_EQ(pick(57344, 8192, 64), "w64 even: 896 x 1 blocks of 64 x 64 on 132 blocks");
  EXPECT_EQ(pick(57344, 8192, 128), "w128 even: 896 x 1 blocks of 64 x 128 on 132 blocks");
  EXPECT_EQ(pick(57344, 8192, 4096), "m256 tail: 3584 tiles of 256 x 256 on 66 clusters");
  EXPECT_EQ(pick(8192, 28672, 64), "c64 whole: 64 tiles of 128 x 64 on 64 clusters");
  EXPECT_EQ(pick(8192, 28672, 128), "c128 whole: 64 tiles of 128 x 128 on 64 clusters");
  EXPECT_EQ(pick(8192, 28672, 256), "c256 whole: 64 tiles of 128 x 256 on 64 clusters");
  EXPECT_EQ(pick(8192, 28672, 4096), "m256 whole: 512 tiles of 256 x 256 on 66 clusters");
  EXPECT_EQ(pick(5120, 8192, 512), "r176 whole: 120 tiles of 128 x 176 on 120 blocks");
}

TEST(GemmPlanTest, PicksTheCheapest) {
  for (const GemmShape& shape : kShapes) {
    const double picked = PriceGemmPlan(shape, PickGemmPlan(shape));
    EXPECT_GT(picked, 0);
    for (const GemmPlan& plan : EnumerateGemmPlans(shape)) {
      EXPECT_LE(picked, PriceGemmPlan(shape, plan)) << PrintGemmPlan(plan);
    }
  }
}

// A step of many rows is never planned with tiles of few tokens, nor the other way round by more than the rows need.
TEST(GemmPlanTest, TilesFitTheRows) {
  for (int64_t rows : {1, 3, 17, 33, 65, 129, 300, 1000, 16384}) {
    for (int64_t n : {512, 1280, 8192, 57344}) {
      const GemmPlan plan = PickGemmPlan({n, 8192, rows});
      EXPECT_LT(int64_t{plan.Config().tokens}, std::max<int64_t>(17, 2 * rows)) << PrintGemmPlan(plan);
      EXPECT_GE(int64_t{plan.split.tile_tokens} * plan.split.token_tiles, rows);
      EXPECT_LT(int64_t{plan.split.tile_tokens} * (plan.split.token_tiles - 1), rows) << "an empty tile";
      EXPECT_LE(plan.split.tile_tokens, plan.Config().tokens);
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
