#include "kernels/cuda/sampling/plan.h"

#include <gtest/gtest.h>

namespace nibble::cuda {
namespace {

constexpr int64_t kHopper = 227 << 10, kAda = 99 << 10;

TEST(SamplePlanTest, SegmentsCoverTheVocabularyInWholeDrawBlocks) {
  for (int capability : {80, 89, 90}) {
    for (int64_t vocab : {1, 63, 64, 65, 4096, 8192, 8193, 32000, 128256, 152064, 1000000}) {
      const SamplePlan plan = PlanSample(vocab, capability, kHopper);
      EXPECT_EQ(plan.segment % 64, 0) << vocab;
      EXPECT_GE(plan.segment * plan.cluster, vocab);
      EXPECT_LT(plan.segment * plan.cluster, vocab + 64 * plan.cluster);
      if (capability < 90) EXPECT_EQ(plan.cluster, 1);
    }
  }
}

TEST(SamplePlanTest, BlocksOfARowGrowWithTheVocabulary) {
  EXPECT_EQ(PlanSample(8192, 90, kHopper).cluster, 1);
  EXPECT_EQ(PlanSample(8193, 90, kHopper).cluster, 2);
  EXPECT_EQ(PlanSample(32000, 90, kHopper).cluster, 4);
  EXPECT_EQ(PlanSample(128256, 90, kHopper).cluster, 8);
  EXPECT_EQ(PlanSample(128256, 90, kHopper).shared_bytes, 16064 * 4);
}

TEST(SamplePlanTest, RowsThatDoNotFitGoThroughScratch) {
  EXPECT_EQ(SampleScratchBytes(3, 128256, 90, kHopper), 0);
  EXPECT_FALSE(PlanSample(128256, 89, kAda).in_shared);
  EXPECT_EQ(PlanSample(128256, 89, kAda).shared_bytes, 0);
  EXPECT_EQ(SampleScratchBytes(3, 128256, 89, kAda), 3 * 128256 * 4);
  EXPECT_EQ(SampleScratchBytes(3, 4096, 89, kAda), 0);
}

}  // namespace
}  // namespace nibble::cuda
