#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "tools/quantize/input_plan.h"

namespace nibble {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

std::vector<float> RandomImportance(int64_t k, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> importance(static_cast<size_t>(k));
  for (float& x : importance) x = static_cast<float>(random() % 1000) / 100;
  return importance;
}

// What lets any tensor-parallel size load a checkpoint: channels never leave their segment.
TEST(PlanInput, PermutationsStayInsideSegments) {
  for (const int64_t segments : {1, 2, 4, 8}) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const int64_t k = 128 * segments * static_cast<int64_t>(1 + seed % 3), segment = k / segments;
      const int64_t eight = static_cast<int64_t>(seed) % (k / 128 + 1);
      const InputPlan plan = PlanInput(RandomImportance(k, seed), segments, eight);
      ASSERT_EQ(static_cast<int64_t>(plan.perm.size()), k);
      std::vector<bool> seen(static_cast<size_t>(k), false);
      for (int64_t i = 0; i < k; ++i) {
        const int32_t channel = plan.perm[static_cast<size_t>(i)];
        ASSERT_EQ(channel / segment, i / segment) << "segments " << segments << " code " << i;
        ASSERT_FALSE(seen[static_cast<size_t>(channel)]);
        seen[static_cast<size_t>(channel)] = true;
      }
      EXPECT_EQ(std::count(plan.block_bits.begin(), plan.block_bits.end(), 8), eight);
      EXPECT_EQ(std::count(plan.block_bits.begin(), plan.block_bits.end(), 4), k / 128 - eight);
    }
  }
}

TEST(PlanInput, GathersTheImportantChannelsInEightBits) {
  std::vector<float> importance(512, 1.0f);
  for (const size_t outlier : {3u, 200u, 300u, 511u}) importance[outlier] = 50;
  const InputPlan whole = PlanInput(importance, 1, 1);
  EXPECT_THAT(whole.block_bits, ElementsAre(8, 4, 4, 4));
  EXPECT_THAT(std::vector<int32_t>(whole.perm.begin(), whole.perm.begin() + 5), ElementsAre(3, 200, 300, 511, 0));

  importance[300] = importance[511] = 2;  // the first half needs it more
  EXPECT_THAT(PlanInput(importance, 2, 1).block_bits, ElementsAre(8, 4, 4, 4));
  EXPECT_THAT(PlanInput(importance, 2, 2).block_bits, ElementsAre(8, 4, 8, 4));
  EXPECT_THAT(PlanInput(importance, 2, 4).block_bits, Each(8));
}

class CodingErrorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto ops = CreateOps({.backend = "cpu", .threads = 1});
    ASSERT_TRUE(ops.ok()) << ops.status();
    ops_ = *std::move(ops);
    std::mt19937_64 random(3);
    for (int t = 0; t < 64; ++t) {
      for (int c = 0; c < 256; ++c) {
        const float uniform = static_cast<float>(random() >> 40) * 0x1p-24f * 2 - 1;
        samples_.push_back(uniform * (c % 37 == 0 ? 30.0f : 1.0f));  // 7 outlier channels, scattered
      }
    }
  }
  double Error(const InputPlan& plan) {
    const auto error = CodingError(ops_.get(), samples_, energy_, plan);
    EXPECT_TRUE(error.ok()) << error.status();
    return error.value_or(-1);
  }
  std::unique_ptr<Ops> ops_;
  std::vector<float> samples_;
  std::vector<float> energy_ = std::vector<float>(256, 1.0f);
};

TEST_F(CodingErrorTest, FallsWithBitsAndWithGathering) {
  std::vector<float> importance(256);
  for (size_t c = 0; c < 256; ++c) importance[c] = c % 37 == 0 ? 30.0f : 1.0f;
  const InputPlan plain{.block_bits = {4, 4}, .perm = {}};
  const double scattered = Error(plain), gathered = Error(PlanInput(importance, 1, 0));
  const double one = Error(PlanInput(importance, 1, 1)), two = Error(PlanInput(importance, 1, 2));
  EXPECT_GT(scattered, 0.003);
  EXPECT_LT(gathered, scattered);
  EXPECT_LT(one, 0.2 * gathered);
  EXPECT_LE(two, one);
  EXPECT_LT(Error(EightBitPlan(256)), 1e-3);
}

TEST_F(CodingErrorTest, CountsOnlyWhatTheLinearReads) {
  std::vector<float> importance(256, 1.0f);
  const InputPlan plan = PlanInput(importance, 1, 0);
  for (size_t c = 0; c < 256; ++c) energy_[c] = c % 37 == 0 ? 0.0f : 1.0f;  // outliers nobody reads hurt the others
  EXPECT_GT(Error(plan), 0.2);
}

TEST_F(CodingErrorTest, SilenceCostsNothing) {
  samples_.assign(samples_.size(), 0.0f);
  EXPECT_EQ(Error(EightBitPlan(256)), 0);
}

BlockBidder Bidder(std::vector<double> errors, int64_t at_least, double worth = 1) {
  const int64_t at_most = static_cast<int64_t>(errors.size()) - 1;
  return {.name = "b",
          .at_least = at_least,
          .at_most = at_most,
          .worth = worth,
          .error = [errors](int64_t n) -> absl::StatusOr<double> { return errors[static_cast<size_t>(n)]; }};
}

TEST(AllocateEightBitBlocks, GivesEachBlockWhereErrorFallsMost) {
  const std::vector<BlockBidder> bidders = {Bidder({9, 8, 7.5, 7.4}, 0), Bidder({9, 4, 3.5}, 0), Bidder({9, 8.9}, 1)};
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 1), ElementsAre(0, 0, 1));
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 2), ElementsAre(0, 1, 1));
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 3), ElementsAre(1, 1, 1));
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 0), ElementsAre(0, 0, 1));  // minimums come first
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 99), ElementsAre(3, 2, 1));
}

TEST(AllocateEightBitBlocks, WeighsErrorsByTheirWorth) {
  const std::vector<BlockBidder> bidders = {Bidder({9, 6}, 0, 0.1), Bidder({9, 8}, 0, 1)};
  EXPECT_THAT(*AllocateEightBitBlocks(bidders, 1), ElementsAre(0, 1));
}

TEST(AllocateEightBitBlocks, KeepsBlocksThatHelpNobody) {
  EXPECT_THAT(*AllocateEightBitBlocks(std::vector<BlockBidder>{Bidder({1, 1, 1}, 0)}, 2), ElementsAre(0));
}

TEST(AllocateEightBitBlocks, PassesErrorsOn) {
  BlockBidder broken = Bidder({1, 1}, 0);
  broken.error = [](int64_t) -> absl::StatusOr<double> { return absl::ResourceExhaustedError("memory"); };
  EXPECT_TRUE(absl::IsResourceExhausted(AllocateEightBitBlocks(std::vector<BlockBidder>{broken}, 1).status()));
}

}  // namespace
}  // namespace nibble
