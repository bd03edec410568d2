#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "common/base/file.h"
#include "common/base/float16.h"
#include "common/model/checkpoint.h"
#include "common/model/writer.h"
#include "tools/quantize/gptq.h"
#include "tools/quantize/import_grid.h"
#include "tools/quantize/import_model.h"
#include "tools/quantize/import_packing.h"

namespace nibble {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kHidden = 128, kIntermediate = 256, kVocab = 32;

std::vector<LinearShape> Linears() {
  const std::string layer = "model.layers.0.";
  return {{.name = layer + "self_attn.q_proj", .n = 128, .k = kHidden},
          {.name = layer + "self_attn.k_proj", .n = 64, .k = kHidden},
          {.name = layer + "self_attn.v_proj", .n = 64, .k = kHidden},
          {.name = layer + "self_attn.o_proj", .n = kHidden, .k = 128},
          {.name = layer + "mlp.gate_proj", .n = kIntermediate, .k = kHidden},
          {.name = layer + "mlp.up_proj", .n = kIntermediate, .k = kHidden},
          {.name = layer + "mlp.down_proj", .n = kHidden, .k = kIntermediate}};
}

// The scales of a row: multiples 3..8 of one number (they fit the grid), or anything within a factor of three.
enum class Scales { kMultiples, kFree, kSpread };

ForeignLinear Draw(const LinearShape& shape, Scales scales, uint64_t seed) {
  std::mt19937_64 random(seed);
  const int64_t groups = shape.k / 128;
  ForeignLinear out{.n = shape.n, .k = shape.k, .codes = {}, .zeros = {}, .scales = {}};
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {  // bell-shaped, as weights are
    out.codes.push_back(static_cast<uint8_t>((random() % 6 + random() % 6 + random() % 6)));
  }
  for (int64_t i = 0; i < shape.n * groups; ++i) {
    out.zeros.push_back(static_cast<uint8_t>(6 + random() % 4));
    const float unit = 0x1p-9f, free = static_cast<float>(random() % 1000) / 1000;
    const float value = scales == Scales::kMultiples ? unit * static_cast<float>(3 + random() % 6)
                        : scales == Scales::kFree    ? unit * (3 + 6 * free)
                                                     : unit * (i % 2 == 0 ? 60.0f : 1.0f);
    out.scales.push_back(ToFloat(ToF16(value)));
  }
  return out;
}

float Value(const ForeignLinear& l, int64_t row, int64_t c) {
  const size_t group = static_cast<size_t>(row * (l.k / 128) + c / 128);
  return l.scales[group] * static_cast<float>(l.codes[static_cast<size_t>(row * l.k + c)] - l.zeros[group]);
}

// Words as the two repositories' pack() fill them: eight values from the lowest nibble up, at the places `order` names.
struct Packed {
  std::vector<int32_t> qweight, qzeros, g_idx;
  std::vector<F16> scales;
};
Packed Pack(const ForeignLinear& l, PackedFormat format) {
  constexpr int kStraight[8] = {0, 1, 2, 3, 4, 5, 6, 7}, kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int* order = format == PackedFormat::kAwq ? kAwqOrder : kStraight;
  const int64_t groups = l.k / 128;
  Packed out;
  const auto word = [](const auto& nibble) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(nibble(i)) << (4 * i);
    return static_cast<int32_t>(bits);
  };
  if (format == PackedFormat::kAwq) {
    for (int64_t c = 0; c < l.k; ++c) {
      for (int64_t n = 0; n < l.n; n += 8)
        out.qweight.push_back(word([&](int i) { return l.codes[static_cast<size_t>((n + order[i]) * l.k + c)]; }));
    }
  } else {
    for (int64_t c = 0; c < l.k; c += 8) {
      for (int64_t n = 0; n < l.n; ++n)
        out.qweight.push_back(word([&](int i) { return l.codes[static_cast<size_t>(n * l.k + c + i)]; }));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t n = 0; n < l.n; n += 8) {
      out.qzeros.push_back(word([&](int i) {
        return l.zeros[static_cast<size_t>((n + order[i]) * groups + g)] - (format == PackedFormat::kGptq ? 1 : 0);
      }));
    }
    for (int64_t n = 0; n < l.n; ++n) out.scales.push_back(ToF16(l.scales[static_cast<size_t>(n * groups + g)]));
  }
  for (int64_t c = 0; c < l.k; ++c) out.g_idx.push_back(static_cast<int32_t>(c / 128));
  return out;
}

class ImportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::temp_directory_path() / ("nibble_import_" + std::to_string(::getpid()));
    std::filesystem::remove_all(root_);
    std::filesystem::create_directories(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  // A one-layer model as the other quantizer leaves it; `change` may damage a linear's tensors.
  void WriteSource(PackedFormat format, Scales scales, const std::string& quantization,
                   const std::function<void(const std::string&, Packed*)>& change = nullptr) {
    const bool awq = format == PackedFormat::kAwq;
    std::vector<TensorSpec> specs = {{"model.embed_tokens.weight", TensorType::kF16, {kVocab, kHidden}},
                                     {"lm_head.weight", TensorType::kF16, {kVocab, kHidden}},
                                     {"model.norm.weight", TensorType::kF16, {kHidden}},
                                     {"model.layers.0.input_layernorm.weight", TensorType::kF16, {kHidden}},
                                     {"model.layers.0.post_attention_layernorm.weight", TensorType::kF16, {kHidden}}};
    for (const LinearShape& l : Linears()) {
      specs.push_back({l.name + ".qweight", TensorType::kI32,
                       awq ? std::vector<int64_t>{l.k, l.n / 8} : std::vector<int64_t>{l.k / 8, l.n}});
      specs.push_back({l.name + ".qzeros", TensorType::kI32, {l.k / 128, l.n / 8}});
      specs.push_back({l.name + ".scales", TensorType::kF16, {l.k / 128, l.n}});
      if (!awq) specs.push_back({l.name + ".g_idx", TensorType::kI32, {l.k}});
    }
    auto writer = ModelWriter::Create(Source(), specs, {.overwrite = true});
    ASSERT_TRUE(writer.ok()) << writer.status();
    for (size_t i = 0; i < 5; ++i) {
      size_t size = 1;
      for (const int64_t d : specs[i].shape) size *= static_cast<size_t>(d);
      ASSERT_TRUE((*writer)->Write(specs[i].name, std::vector<F16>(size, ToF16(0.5f))).ok());
    }
    uint64_t seed = 1;
    for (const LinearShape& l : Linears()) {
      linears_[l.name] = Draw(l, scales, seed++);
      Packed packed = Pack(linears_[l.name], format);
      if (change) change(l.name, &packed);
      ASSERT_TRUE((*writer)->Write(l.name + ".qweight", packed.qweight).ok());
      ASSERT_TRUE((*writer)->Write(l.name + ".qzeros", packed.qzeros).ok());
      ASSERT_TRUE((*writer)->Write(l.name + ".scales", packed.scales).ok());
      if (!awq) {
        ASSERT_TRUE((*writer)->Write(l.name + ".g_idx", packed.g_idx).ok());
      }
    }
    ASSERT_TRUE((*writer)
                    ->WriteFile("config.json", R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
      "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64,
      "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu",
      "quantization_config": )" + quantization + "}")
                    .ok());
    ASSERT_TRUE((*writer)->WriteFile("tokenizer.json", "{}").ok());
    ASSERT_TRUE((*writer)->Commit().ok());
  }

  absl::StatusOr<ImportReport> Import() {
    return ImportModel({.model = Source(), .output = Output(), .overwrite = true, .threads = 2},
                       [](int64_t, int64_t) { return absl::OkStatus(); });
  }
  absl::Status Refusal() {
    const absl::Status status = Import().status();
    EXPECT_FALSE(std::filesystem::exists(Output()));
    return status;
  }
  std::string Source() const { return root_ / "source"; }
  std::string Output() const { return root_ / "output"; }

  std::filesystem::path root_;
  std::map<std::string, ForeignLinear> linears_;
};

const char kGptq[] = R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": false})";
const char kGptqV2[] = R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"})";
const char kAwq[] = R"({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": true})";

TEST_F(ImportTest, TakesGridScalesExactly) {
  const std::pair<PackedFormat, const char*> formats[] = {
      {PackedFormat::kGptq, kGptq}, {PackedFormat::kGptqV2, kGptqV2}, {PackedFormat::kAwq, kAwq}};
  for (const auto& [format, config] : formats) {
    ASSERT_NO_FATAL_FAILURE(WriteSource(format, Scales::kMultiples, config));
    const auto report = Import();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->linears, 7);
    EXPECT_EQ(report->exact, 7);
    EXPECT_EQ(report->method, format == PackedFormat::kAwq ? "awq" : "gptq");

    const auto checkpoint = Checkpoint::Open(Output());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ((*checkpoint)->config().quantization, Quantization::kW4A8KV4);
    for (const LinearShape& l : Linears()) {
      const auto tensors = (*checkpoint)->Linear(l.name, ShardAxis::kNone, 0, 1);
      ASSERT_TRUE(tensors.ok()) << tensors.status();
      const std::vector<float> weight = DequantizeLinear(*tensors);
      for (int64_t i = 0; i < l.n * l.k; ++i) {
        ASSERT_NEAR(weight[static_cast<size_t>(i)], Value(linears_[l.name], i / l.k, i % l.k), 1e-7f)
            << l.name << " " << i;
      }
    }
  }
}

TEST_F(ImportTest, StaysNearScalesThatAreOffTheGrid) {
  ASSERT_NO_FATAL_FAILURE(WriteSource(PackedFormat::kAwq, Scales::kFree, kAwq));
  const auto report = Import();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GT(report->rms_steps, 0);
  EXPECT_LE(report->rms_steps, 0.15);
  const auto checkpoint = Checkpoint::Open(Output());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::string name = "model.layers.0.mlp.down_proj";  // two groups in a row
  const ForeignLinear& source = linears_[name];
  const std::vector<float> weight = DequantizeLinear(*(*checkpoint)->Linear(name, ShardAxis::kNone, 0, 1));
  double squared = 0;
  for (int64_t i = 0; i < source.n * source.k; ++i) {
    const int64_t row = i / source.k, c = i % source.k;
    const float scale = source.scales[static_cast<size_t>(row * 2 + c / 128)];
    const double steps = static_cast<double>((weight[static_cast<size_t>(i)] - Value(source, row, c)) / scale);
    squared += steps * steps;
  }
  EXPECT_LE(std::sqrt(squared / static_cast<double>(source.n * source.k)), 1.001 * report->rms_steps);
}

TEST_F(ImportTest, RefusesScalesTooFarApart) {
  ASSERT_NO_FATAL_FAILURE(WriteSource(PackedFormat::kAwq, Scales::kSpread, kAwq));
  const absl::Status status = Refusal();
  EXPECT_TRUE(absl::IsUnimplemented(status));
  EXPECT_THAT(status.message(), AllOf(HasSubstr("down_proj.scales"), HasSubstr("two-level grid"), HasSubstr("0.15")));
}

TEST_F(ImportTest, NamesWhatItCannotRead) {
  const std::tuple<PackedFormat, std::string, std::string> configs[] = {
      {PackedFormat::kGptq, R"({"quant_method": "gptq", "bits": 8, "group_size": 128})", "bits is 8, must be 4"},
      {PackedFormat::kGptq, R"({"quant_method": "gptq", "bits": 4, "group_size": -1})",
       "group_size is -1, must be 128"},
      {PackedFormat::kGptq, R"({"quant_method": "gptq", "bits": 4})", "group_size is missing"},
      {PackedFormat::kGptq, R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"})",
       "checkpoint_format"},
      {PackedFormat::kAwq, R"({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"})", "version"},
      {PackedFormat::kAwq, R"({"quant_method": "fp8"})", "quant_method"},
      {PackedFormat::kAwq, "7", "no quantization_config"},
      {PackedFormat::kAwq, kGptq, "qweight"},  // the other one's shapes
  };
  for (const auto& [format, config, reason] : configs) {
    ASSERT_NO_FATAL_FAILURE(WriteSource(format, Scales::kMultiples, config));
    EXPECT_THAT(Refusal().message(), HasSubstr(reason));
  }
}

TEST_F(ImportTest, NamesTheDamagedTensor) {
  const std::string name = "model.layers.0.mlp.up_proj";
  const auto on_up = [&](const std::function<void(Packed*)>& damage) {
    return [&name, damage](const std::string& linear, Packed* packed) {
      if (linear == name) damage(packed);
    };
  };
  ASSERT_NO_FATAL_FAILURE(
      WriteSource(PackedFormat::kGptq, Scales::kMultiples, kGptq, on_up([](Packed* p) { p->g_idx[5] = 1; })));
  EXPECT_THAT(Refusal().message(), AllOf(HasSubstr(name + ".g_idx"), HasSubstr("desc_act")));
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -1.0f}) {
    ASSERT_NO_FATAL_FAILURE(WriteSource(PackedFormat::kAwq, Scales::kMultiples, kAwq,
                                        on_up([bad](Packed* p) { p->scales[9] = ToF16(bad); })));
    EXPECT_THAT(Refusal().message(), HasSubstr(name + ".scales: group 0 of output 9"));
  }
}

TEST(MapOntoGrid, KeepsRowsOfZeros) {
  const LinearShape shape{.name = "l", .n = 8, .k = 256};
  ForeignLinear linear = Draw(shape, Scales::kMultiples, 3);
  linear.scales[2] = linear.scales[3] = 0;  // row 1
  linear.scales[4] = 0;                     // half of row 2
  ThreadPool pool(1);
  GridFit fit;
  const LinearTensors tensors = MapOntoGrid(linear, shape, &pool, &fit);
  const std::vector<float> weight = DequantizeLinear(tensors);
  for (int64_t i = 0; i < 8 * 256; ++i)
    ASSERT_NEAR(weight[static_cast<size_t>(i)], Value(linear, i / 256, i % 256), 1e-7f) << i;
  EXPECT_TRUE(fit.exact());
}

}  // namespace
}  // namespace nibble
