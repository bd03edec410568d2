// The bundled model against numbers computed outside this project, in short; nibble-eval runs all of them.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "tools/eval/golden.h"
#include "tools/eval/scorer.h"
#include "worker/model/rope_table.h"

namespace nibble {
namespace {

const char kModel[] = "deploy/models/novelist-17m";

class Golden : public ::testing::TestWithParam<int> {};

TEST_P(Golden, FirstPromptsWithinTolerance) {
  const auto checkpoint = Checkpoint::Open(kModel);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  auto prompts = LoadGolden(std::string(kModel) + "/golden.json");
  ASSERT_TRUE(prompts.ok()) << prompts.status();
  prompts->resize(2);
  const auto group = EngineGroup::Create(
      **checkpoint, {.world_size = GetParam(), .limits = ScoringLimits((*checkpoint)->config(), GetParam(), 128)});
  ASSERT_TRUE(group.ok()) << group.status();
  const auto reports = CompareGolden(**group, *prompts);
  ASSERT_TRUE(reports.ok()) << reports.status();
  ASSERT_EQ(reports->size(), 2u);
  for (const GoldenReport& report : *reports) {
    EXPECT_EQ(report.tokens, 96);
    EXPECT_LT(report.max_logprob_error, 1e-3) << report.prompt;
    EXPECT_LT(report.max_logit_error, 1e-3) << report.prompt;
  }
}

INSTANTIATE_TEST_SUITE_P(TensorParallelSizes, Golden, ::testing::Values(1, 2));

TEST(GoldenFile, DamagedFilesAreRefused) {
  const std::string path = ::testing::TempDir() + "golden_damaged.json";
  for (const char* text :
       {"", "{", "[]", "{\"prompts\": []}", "{\"prompts\": [{}]}",
        "{\"prompts\": [{\"prompt\": \"x\", \"prompt_ids\": [1], \"greedy_ids\": [1, 2], \"greedy_logprobs\": [0.5], "
        "\"last_prompt_logits_top5\": [[1, 2.0]]}]}",
        "{\"prompts\": [{\"prompt\": \"x\", \"prompt_ids\": \"no\"}]}"}) {
    std::ofstream(path) << text;
    EXPECT_EQ(LoadGolden(path).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  EXPECT_EQ(LoadGolden("/nonexistent/golden.json").status().code(), absl::StatusCode::kNotFound);
}

TEST(RopeTable, PlainFrequenciesAndAngles) {
  ModelConfig config;
  config.head_dim = 64;
  config.max_position_embeddings = 100;
  config.rope_theta = 10000;
  const std::vector<double> frequencies = RopeInverseFrequencies(config);
  ASSERT_EQ(frequencies.size(), 32u);
  EXPECT_DOUBLE_EQ(frequencies[0], 1.0);
  EXPECT_NEAR(frequencies[16], 0.01, 1e-15);
  const std::vector<float> table = RopeTable(config);
  ASSERT_EQ(table.size(), 6400u);
  EXPECT_EQ(table[0], 1.0f);
  EXPECT_EQ(table[32], 0.0f);
  EXPECT_FLOAT_EQ(table[99 * 64 + 16], std::cos(0.99f));
  EXPECT_FLOAT_EQ(table[99 * 64 + 48], std::sin(0.99f));
}

// Llama 3.1: wavelengths below 8192/4 keep their frequency, above 8192 are stretched by 8, between them interpolated.
TEST(RopeTable, Llama31Scaling) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000;
  const std::vector<double> plain = RopeInverseFrequencies(config);
  config.rope_scaling = RopeScaling{};
  const std::vector<double> scaled = RopeInverseFrequencies(config);
  int kept = 0, between = 0, stretched = 0;
  for (size_t d = 0; d < plain.size(); ++d) {
    const double wavelength = 2 * M_PI / plain[d];
    if (wavelength < 2048) {
      EXPECT_EQ(scaled[d], plain[d]);
      ++kept;
    } else if (wavelength > 8192) {
      EXPECT_DOUBLE_EQ(scaled[d], plain[d] / 8);
      ++stretched;
    } else {
      const double smooth = (8192 / wavelength - 1) / (4 - 1);
      EXPECT_NEAR(scaled[d], (1 - smooth) * plain[d] / 8 + smooth * plain[d], 1e-18);
      ++between;
    }
  }
  EXPECT_EQ(kept, 29);
  EXPECT_EQ(between, 6);
  EXPECT_EQ(stretched, 29);
}

}  // namespace
}  // namespace nibble
