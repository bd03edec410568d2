// One quantized checkpoint at every tensor-parallel size: row-parallel inputs are coded shard by shard, so results may
// differ in the last bits, and perplexity by next to nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "common/text/tokenizer.h"
#include "tests/model/tiny_model.h"
#include "tests/tools/eval_rig.h"
#include "tools/quantize/quantizer.h"

namespace nibble {
namespace {

using ::nibble::testing::TappedEngine;
using ::nibble::testing::TempDir;

constexpr char kBundled[] = "deploy/models/novelist-17m";
constexpr char kText[] = "deploy/models/text/calibration.txt";
constexpr double kLargestDifference = 0.003;  // of ln(perplexity)

std::vector<std::vector<uint32_t>> Windows(size_t skip, size_t count, size_t length) {
  const auto tokenizer = Tokenizer::Load(kBundled);
  NIBBLE_CHECK(tokenizer.ok());
  std::ifstream in(kText);
  const std::string text(std::istreambuf_iterator<char>(in), {});
  const auto ids = (*tokenizer)->Encode(text.substr(0, 8 * (skip + count) * length), {.add_special_tokens = false});
  NIBBLE_CHECK(ids.ok() && ids->size() >= (skip + count) * length);
  std::vector<std::vector<uint32_t>> windows;
  for (size_t i = skip; i < skip + count; ++i) {
    const auto begin = ids->begin() + static_cast<ptrdiff_t>(i * length);
    windows.emplace_back(begin, begin + static_cast<ptrdiff_t>(length));
  }
  return windows;
}

std::vector<double> LogProbs(const std::string& dir, int world_size,
                             const std::vector<std::vector<uint32_t>>& windows) {
  TappedEngine engine(dir, static_cast<int64_t>(windows.front().size()), kScoreStepTokens, world_size);
  const auto scores = Score(*engine.group, windows, 0);
  NIBBLE_CHECK(scores.ok(), scores.status().ToString());
  std::vector<double> out;
  for (const auto& window : *scores) {
    for (const TokenScore& score : window) out.push_back(static_cast<double>(score.logprob));
  }
  return out;
}

// ln of the ratio of perplexities, and its standard error: a text this short knows it no better.
struct Difference {
  double mean = 0, error = 0;
};
Difference Compare(const std::vector<double>& a, const std::vector<double>& b) {
  NIBBLE_CHECK_EQ(a.size(), b.size());
  const double n = static_cast<double>(a.size());
  double sum = 0, squares = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] - b[i], squares += (a[i] - b[i]) * (a[i] - b[i]);
  const double mean = sum / n;
  return {.mean = mean, .error = std::sqrt(std::max(0.0, squares / n - mean * mean) / n)};
}

class TensorParallelTest : public ::testing::TestWithParam<Quantization> {
 protected:
  void Quantize(const std::string& model, const std::string& preset) {
    QuantizeOptions options;
    options.model = model;
    options.output = dir_ / "quantized";
    options.mode = GetParam();
    options.calibration = kText;
    options.calibration_options = {.windows = 8, .min_windows = 4, .window_tokens = 128, .sample_rows = 256};
    const auto settings = PresetSettings(preset);
    ASSERT_TRUE(settings.ok()) << settings.status();
    options.settings = *settings;
    QuantizeListener listener;
    const auto report = QuantizeModel(options, &listener);
    ASSERT_TRUE(report.ok()) << report.status();
  }
  void ExpectOnePerplexity(std::initializer_list<int> sizes, const std::vector<std::vector<uint32_t>>& windows) {
    const std::vector<double> alone = LogProbs(dir_ / "quantized", 1, windows);
    for (const int size : sizes) {
      const Difference difference = Compare(alone, LogProbs(dir_ / "quantized", size, windows));
      EXPECT_LT(std::fabs(difference.mean), kLargestDifference + 2.5 * difference.error) << "size " << size;
      EXPECT_LT(difference.error, 0.01) << "size " << size << ": too few tokens to tell";
    }
  }
  TempDir dir_;
};

TEST_P(TensorParallelTest, BundledModel) {
  Quantize(kBundled, "best");
  ExpectOnePerplexity({2}, Windows(100, 12, 256));
}

// Eight key heads: sizes up to 8, the ranks as threads of this process.
TEST_P(TensorParallelTest, EightKeyHeads) {
  const std::string model = dir_ / "model";
  ASSERT_TRUE(testing::WriteTinyModel({.intermediate_size = 1024,
                                       .num_heads = 8,
                                       .num_kv_heads = 8,
                                       .head_dim = 128,
                                       .vocab_size = 4096},
                                      model)
                  .ok());
  std::filesystem::copy_file(std::string(kBundled) + "/tokenizer.json", model + "/tokenizer.json");
  Quantize(model, "best");
  ExpectOnePerplexity({2, 4, 8}, Windows(100, 12, 128));
}

INSTANTIATE_TEST_SUITE_P(Modes, TensorParallelTest,
                         ::testing::Values(Quantization::kW4A4KV4, Quantization::kW4A8KV4),
                         [](const auto& p) { return std::string(QuantizationName(p.param)); });

}  // namespace
}  // namespace nibble
