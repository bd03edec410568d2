#include "kernels/cuda/dense/plan.h"

#include <gtest/gtest.h>

namespace nibble::cuda {
namespace {

constexpr int64_t kHopper = 227 << 10, kAda = 99 << 10;

TEST(DensePlanTest, TheSmallestTileThatTakesAllRows) {
  const auto rows = [](int64_t rows) { return PlanDense(rows, 8192, DType::kBF16, kHopper).rows; };
  EXPECT_EQ(rows(1), 8);
  EXPECT_EQ(rows(8), 8);
  EXPECT_EQ(rows(9), 16);
  EXPECT_EQ(rows(33), 64);
  EXPECT_EQ(rows(129), 256);
  EXPECT_EQ(rows(5000), 256);
}

TEST(DensePlanTest, ADeviceWithLessSharedMemoryTakesSmallerTiles) {
  for (int64_t rows : {1, 64, 65, 4096}) {
    const DensePlan plan = PlanDense(rows, 8192, DType::kBF16, kAda);
    EXPECT_TRUE(plan.mma());
    EXPECT_LE(plan.shared_bytes(), kAda);
  }
}

TEST(DensePlanTest, TheArithmeticDependsOnKAndTypeAlone) {
  for (int64_t rows : {1, 7, 64, 300, 10000}) {
    for (int64_t shared : {kAda, kHopper}) {
      EXPECT_TRUE(PlanDense(rows, 512, DType::kBF16, shared).mma());
      EXPECT_FALSE(PlanDense(rows, 512, DType::kF32, shared).mma());
      EXPECT_FALSE(PlanDense(rows, 100, DType::kBF16, shared).mma());
    }
  }
}

TEST(DensePlanTest, BlocksFitTheirMultiprocessor) {
  for (const DensePlan& plan : kDensePlans) {
    EXPECT_LE(plan.blocks * (plan.shared_bytes() + 1024), 228 << 10) << plan.rows;
    EXPECT_EQ(plan.threads * kDensePanelN, plan.outputs * 128) << plan.rows;
    EXPECT_EQ(plan.stage_bytes() % 1024, 0) << plan.rows;
    EXPECT_EQ(plan.shared_bytes() <= 163 << 10, &plan < kDensePlans + kDensePlansBeforeHopper) << plan.rows;
  }
}

}  // namespace
}  // namespace nibble::cuda
