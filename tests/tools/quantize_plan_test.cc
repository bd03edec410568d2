#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
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
TEST(SortChannels, StaysInsideSegments) {
  for (const int64_t segments : {1, 2, 4, 8}) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const int64_t k = 128 * segments * static_cast<int64_t>(1 + seed % 3), segment = k / segments;
      const std::vector<float> importance = RandomImportance(k, seed);
      const std::vector<int32_t> perm = SortChannels(importance, segments);
      ASSERT_EQ(static_cast<int64_t>(perm.size()), k);
      std::vector<bool> seen(static_cast<size_t>(k), false);
      for (int64_t i = 0; i < k; ++i) {
        const int32_t channel = perm[static_cast<size_t>(i)];
        ASSERT_EQ(channel / segment, i / segment) << "segments " << segments << " code " << i;
        ASSERT_FALSE(seen[static_cast<size_t>(channel)]);
        seen[static_cast<size_t>(channel)] = true;
        if (i % segment != 0) {
          ASSERT_LE(importance[static_cast<size_t>(channel)],
                    importance[static_cast<size_t>(perm[static_cast<size_t>(i - 1)])]);
        }
      }
    }
  }
}

TEST(SortChannels, KeepsTheOrderOfEquals) {
  std::vector<float> importance(512, 1.0f);
  for (const size_t outlier : {3u, 200u, 300u, 511u}) importance[outlier] = 50;
  const std::vector<int32_t> perm = SortChannels(importance, 1);
  EXPECT_THAT(std::vector<int32_t>(perm.begin(), perm.begin() + 6), ElementsAre(3, 200, 300, 511, 0, 1));
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
  static InputPlan Gathered(const std::vector<float>& importance, std::vector<uint8_t> bits) {
    return {.block_bits = std::move(bits), .perm = SortChannels(importance, 1)};
  }
  std::unique_ptr<Ops> ops_;
  std::vector<float> samples_;
  std::vector<float> energy_ = std::vector<float>(256, 1.0f);
};

TEST_F(CodingErrorTest, FallsWithBitsAndWithGathering) {
  std::vector<float> importance(256);
  for (size_t c = 0; c < 256; ++c) importance[c] = c % 37 == 0 ? 30.0f : 1.0f;
  const InputPlan plain{.block_bits = {4, 4}, .perm = {}};
  const double scattered = Error(plain), gathered = Error(Gathered(importance, {4, 4}));
  const double one = Error(Gathered(importance, {8, 4})), two = Error(Gathered(importance, {8, 8}));
  EXPECT_GT(scattered, 0.003);
  EXPECT_LT(gathered, scattered);
  EXPECT_LT(one, 0.2 * gathered);
  EXPECT_LE(two, one);
  EXPECT_LT(Error(EightBitPlan(256)), 1e-3);
}

TEST_F(CodingErrorTest, CountsOnlyWhatTheLinearReads) {
  std::vector<float> importance(256, 1.0f);
  const InputPlan plan = Gathered(importance, {4, 4});
  for (size_t c = 0; c < 256; ++c) energy_[c] = c % 37 == 0 ? 0.0f : 1.0f;  // outliers nobody reads hurt the others
  EXPECT_GT(Error(plan), 0.2);
}

TEST_F(CodingErrorTest, SilenceCostsNothing) {
  samples_.assign(samples_.size(), 0.0f);
  EXPECT_EQ(Error(EightBitPlan(256)), 0);
}

TEST_F(CodingErrorTest, PlansByWhatTheOutputLoses) {
  std::vector<float> importance(256);
  for (size_t c = 0; c < 256; ++c) importance[c] = c % 37 == 0 ? 30.0f : 1.0f;
  const std::vector<int32_t> gathered = SortChannels(importance, 1);
  const auto plan = PlanByOutputError(ops_.get(), samples_, energy_, gathered, 1);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->block_bits, ElementsAre(8, 4));
  EXPECT_EQ(plan->perm, gathered);
  EXPECT_THAT(PlanByOutputError(ops_.get(), samples_, energy_, gathered, 0)->block_bits, Each(4));
  EXPECT_THAT(PlanByOutputError(ops_.get(), samples_, energy_, gathered, 2)->block_bits, Each(8));

  // The block of the outliers is the largest; but when only quiet channels are read, they are where bits help.
  for (size_t c = 0; c < 256; ++c) energy_[c] = c % 37 == 0 ? 0.0f : 1.0f;
  for (size_t i = 0; i < 128; ++i) energy_[static_cast<size_t>(gathered[i])] = 0;
  EXPECT_THAT(PlanByOutputError(ops_.get(), samples_, energy_, gathered, 1)->block_bits, ElementsAre(4, 8));
}

TEST_F(CodingErrorTest, CodedRowsAreWhatTheLinearReads) {
  const InputPlan plan{.block_bits = {8, 8},
                       .perm = SortChannels(std::vector<float>(samples_.begin(), samples_.begin() + 256), 2)};
  const auto coded = CodeRows(ops_.get(), samples_, 256, plan);
  ASSERT_TRUE(coded.ok()) << coded.status();
  for (size_t i = 0; i < samples_.size(); ++i) ASSERT_NEAR((*coded)[i], samples_[i], 0.5f * 30 / 127 + 1e-4f) << i;
}

// COMET's share at the widths of Llama-3-8B and 70B, and one block for the narrow inputs of small models.
TEST(EightBitBudget, StaysUnderTheShare) {
  for (const int64_t k : {4096, 14336, 8192, 28672}) {
    const int64_t blocks = EightBitBudget(k, 0.17);
    EXPECT_LE(static_cast<double>(blocks), 0.17 * static_cast<double>(k / 128)) << k;
    EXPECT_GT(static_cast<double>(blocks + 1), 0.17 * static_cast<double>(k / 128)) << k;
  }
  EXPECT_EQ(EightBitBudget(512, 0.17), 1);
  EXPECT_EQ(EightBitBudget(1536, 0.17), 2);
  EXPECT_EQ(EightBitBudget(1536, 0.25), 3);
  EXPECT_EQ(EightBitBudget(4096, 0), 0);
  EXPECT_EQ(EightBitBudget(4096, 1), 32);
}

}  // namespace
}  // namespace nibble
