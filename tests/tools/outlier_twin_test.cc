// The twin computes what the model computes, and has outliers.
#include "tools/accuracy/outlier_twin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>

#include "common/text/tokenizer.h"
#include "tests/model/tiny_model.h"
#include "tests/tools/eval_rig.h"

namespace nibble {
namespace {

using ::nibble::testing::AllLogits;
using ::nibble::testing::SomeSequences;
using ::nibble::testing::TappedEngine;
using ::nibble::testing::TempDir;
constexpr char kModel[] = "deploy/models/novelist-17m";

std::vector<std::vector<uint32_t>> Windows(size_t count, size_t length) {
  const auto tokenizer = Tokenizer::Load(kModel);
  NIBBLE_CHECK(tokenizer.ok());
  std::ifstream in("deploy/models/text/calibration.txt");
  std::string text(std::istreambuf_iterator<char>(in), {});
  const auto ids = (*tokenizer)->Encode(text.substr(0, 8 * count * length), {.add_special_tokens = false});
  NIBBLE_CHECK(ids.ok() && ids->size() >= count * length);
  std::vector<std::vector<uint32_t>> windows;
  for (size_t i = 0; i < count; ++i) {
    const auto begin = ids->begin() + static_cast<ptrdiff_t>(i * length);
    windows.emplace_back(begin, begin + static_cast<ptrdiff_t>(length));
  }
  return windows;
}

double RelativeDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = std::max(difference, std::fabs(static_cast<double>(a[i] - b[i])));
    largest = std::max(largest, std::fabs(static_cast<double>(a[i])));
  }
  return difference / largest;
}

TEST(OutlierTwin, ComputesTheSameFunction) {
  TempDir dir;
  const absl::Status written = WriteOutlierTwin({.model = kModel, .output = dir / "twin"});
  ASSERT_TRUE(written.ok()) << written;
  const auto windows = Windows(4, 128);
  TappedEngine model(kModel, 128), twin(dir / "twin", 128);
  EXPECT_LT(RelativeDifference(AllLogits(model, windows), AllLogits(twin, windows)), 1e-3);
  const auto report = CompareDistributions(twin.tapped(), model.tapped(), windows, 4096, 1, {});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_NEAR(report->perplexity / report->reference_perplexity, 1, 1e-4);

  const std::vector<int64_t> shape = {512};
  for (const char* name : {"model.layers.0.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight"}) {
    const auto before = model.checkpoint->Dense(name, shape), after = twin.checkpoint->Dense(name, shape);
    ASSERT_TRUE(before.ok() && after.ok());
    int grown = 0;
    for (size_t i = 0; i < before->size(); ++i) grown += ToFloat((*after)[i]) > 14 * ToFloat((*before)[i]);
    EXPECT_EQ(grown, 6) << name;
  }
}

// Biases of q and k, tied heads, several key heads.
TEST(OutlierTwin, KeepsBiasedAndTiedModels) {
  TempDir dir;
  ASSERT_TRUE(
      testing::WriteTinyModel({.num_kv_heads = 4, .tie_word_embeddings = true, .attention_bias = true}, dir / "m").ok());
  ASSERT_TRUE(WriteOutlierTwin({.model = dir / "m", .output = dir / "t", .seed = 9}).ok());
  TappedEngine model(dir / "m", 40), twin(dir / "t", 40);
  const auto sequences = SomeSequences(3, 40, 320);
  EXPECT_LT(RelativeDifference(AllLogits(model, sequences), AllLogits(twin, sequences)), 5e-3);
  const auto q = model.checkpoint->Linear("model.layers.0.self_attn.k_proj", ShardAxis::kNone, 0, 1);
  const auto grown = twin.checkpoint->Linear("model.layers.0.self_attn.k_proj", ShardAxis::kNone, 0, 1);
  ASSERT_TRUE(q.ok() && grown.ok());
  int changed = 0;
  for (size_t i = 0; i < q->bias.size(); ++i) changed += q->bias[i] != grown->bias[i];
  EXPECT_EQ(changed, 4 * 2 * 2);  // two pairs of each head
}

TEST(OutlierTwin, RefusesWhatItCannotUse) {
  TempDir dir;
  ASSERT_TRUE(testing::WriteTinyModel({.quantization = Quantization::kW4A8KV4}, dir / "q").ok());
  EXPECT_EQ(WriteOutlierTwin({.model = dir / "q", .output = dir / "t"}).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(testing::WriteTinyModel({}, dir / "m").ok());
  const absl::Status many = WriteOutlierTwin({.model = dir / "m", .output = dir / "t", .channels = 257});
  EXPECT_THAT(std::string(many.message()), ::testing::HasSubstr("channels is 257, must be in 0..256"));
  EXPECT_EQ(WriteOutlierTwin({.model = dir / "m", .output = dir / "q"}).code(), absl::StatusCode::kAlreadyExists);
}

}  // namespace
}  // namespace nibble
