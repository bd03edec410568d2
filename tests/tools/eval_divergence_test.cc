// Divergence of a model from a reference, through two engines.
#include "tools/eval/divergence.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/model/tiny_model.h"
#include "tests/tools/eval_rig.h"
#include "tools/eval/per_token_ops.h"

namespace nibble {
namespace {

using ::nibble::testing::AllLogits;
using ::nibble::testing::SomeSequences;
using ::nibble::testing::TappedEngine;
using ::nibble::testing::TempDir;
using ::nibble::testing::TinyModel;
using ::nibble::testing::WriteTinyModel;

TEST(KlDivergence, MatchesTheDefinition) {
  const std::vector<float> p = {std::log(0.5f), std::log(0.25f), std::log(0.25f)};
  const std::vector<float> q = {std::log(0.25f), std::log(0.25f), std::log(0.5f)};
  EXPECT_NEAR(KlDivergence(p, q), 0.5 * std::log(2.0) - 0.25 * std::log(2.0), 1e-7);
  EXPECT_EQ(KlDivergence(p, p), 0.0);
  std::vector<float> shifted = q;  // logits are free up to a constant
  for (float& x : shifted) x += 80;
  EXPECT_NEAR(KlDivergence(p, shifted), KlDivergence(p, q), 1e-5);
}

TEST(DivergenceSteps, HoldAnyVocabulary) {
  EXPECT_EQ(DivergenceStepTokens(4096), kScoreStepTokens);
  EXPECT_EQ(DivergenceStepTokens(131072), 512);
  EXPECT_EQ(DivergenceStepTokens(int64_t{1} << 30), 64);
}

class CompareTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyModel({.seed = 1}, dir_ / "a").ok());
    ASSERT_TRUE(WriteTinyModel({.seed = 2}, dir_ / "b").ok());
  }
  TempDir dir_;
};

TEST_F(CompareTest, AModelIsItself) {
  TappedEngine a(dir_ / "a", 48), b(dir_ / "a", 48);
  int64_t finished = 0;
  const auto report = CompareDistributions(a.tapped(), b.tapped(), SomeSequences(5, 48, 320), 320, 2,
                                           [&](int64_t n) { finished += n; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(finished, 5);
  EXPECT_EQ(report->tokens, 5 * 47);
  EXPECT_EQ(report->p99_kl, 0);
  EXPECT_EQ(report->top1_agreement, 1);
  EXPECT_EQ(report->perplexity, report->reference_perplexity);
}

// Sums over rows taken from the engines one by one, whatever the steps.
TEST_F(CompareTest, SumsEveryRowInAnySteps) {
  const auto sequences = SomeSequences(6, 100, 320);
  TappedEngine a(dir_ / "a", 100), b(dir_ / "b", 100);
  const std::vector<float> ours = AllLogits(a, sequences), theirs = AllLogits(b, sequences);
  ASSERT_EQ(ours.size(), 6u * 99 * 320);
  ASSERT_EQ(theirs.size(), ours.size());
  double sum = 0;
  std::vector<double> all;
  for (size_t row = 0; row < ours.size() / 320; ++row) {
    all.push_back(KlDivergence({theirs.data() + row * 320, 320}, {ours.data() + row * 320, 320}));
    sum += all.back();
  }
  std::ranges::sort(all);
  const auto report = CompareDistributions(a.tapped(), b.tapped(), sequences, 320, 1, {});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_NEAR(report->mean_kl, sum / 594, 1e-9);
  EXPECT_EQ(report->p99_kl, all[593 * 99 / 100]);
  EXPECT_GT(report->mean_kl, 0.01);
  EXPECT_LT(report->top1_agreement, 0.5);
}

TEST_F(CompareTest, SmallStepsGiveTheSameRows) {
  const auto sequences = SomeSequences(3, 200, 320);
  TappedEngine whole(dir_ / "a", 200), cut(dir_ / "a", 200, /*step_tokens=*/200);
  std::vector<float> pieces;
  cut.tap.SetListener([&](std::span<const float> rows, int64_t) { pieces.insert(pieces.end(), rows.begin(), rows.end()); });
  cut.group->Reset();
  const absl::Status status =
      ForEachScoringStep(sequences, 64, cut.group->num_pages(), 0,
                         [&](const ScoringStep& step) { return cut.group->Execute(step.plan).status(); });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(pieces, AllLogits(whole, sequences));
}

TEST(PerTokenFourBits, UsesFifteenLevelsWhateverTheBlocksSay) {
  auto ops = CreateOps({.backend = "cpu", .threads = 1});
  ASSERT_TRUE(ops.ok()) << ops.status();
  PerTokenFourBitOps four_bits(*std::move(ops));
  constexpr int64_t kK = 256;
  std::vector<float> x(kK, 0.26f);
  x[3] = -7;
  x[200] = 3.4f;
  const uint8_t bits[] = {8, 4};
  const InputCoding coding = {.k = kK, .quantized = true, .block_bits = bits};
  std::vector<int8_t> codes(kK);
  float scale = 0;
  int32_t sum = 0;
  std::vector<uint8_t> exponents(2);
  LinearInput out = {.rows = 1, .k = kK, .codes = codes.data(), .scales = &scale, .code_sums = &sum,
                     .exponents = exponents.data()};
  four_bits.Quantize({.in = {.data = x.data(), .dtype = DType::kF32, .rows = 1, .cols = kK}, .coding = &coding, .out = &out});
  EXPECT_FLOAT_EQ(scale, 1);
  EXPECT_EQ(codes[3], -7);
  EXPECT_EQ(codes[200], 3);
  EXPECT_EQ(codes[0], 0);
  EXPECT_EQ(sum, -4);
}

}  // namespace
}  // namespace nibble
