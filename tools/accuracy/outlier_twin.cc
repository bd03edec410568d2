#include "tools/accuracy/outlier_twin.h"

#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/model/checkpoint.h"
#include "common/model/writer.h"

namespace nibble {
namespace {

constexpr const char* kCopiedFiles[] = {"config.json", "tokenizer.json", "tokenizer_config.json",
                                        "generation_config.json"};
constexpr int64_t kMaxCopiedBytes = int64_t{256} << 20;

// A matrix [n, k], or a vector as [n, 1].
struct Matrix {
  int64_t n = 0, k = 1;
  std::vector<BF16> values;

  // Multiplies by `factor` and returns the factor that bf16 made of it (for the one value of a vector's row).
  float ScaleRow(int64_t row, float factor) {
    float made = factor;
    for (int64_t c = 0; c < k; ++c) made = Scale(row * k + c, factor);
    return k == 1 ? made : factor;
  }
  void DivideColumn(int64_t column, float factor) {
    for (int64_t row = 0; row < n; ++row) Scale(row * k + column, 1 / factor);
  }

 private:
  float Scale(int64_t at, float factor) {
    BF16& value = values[static_cast<size_t>(at)];
    const float old = ToFloat(value);
    value = ToBF16(old * factor);
    return old == 0 ? factor : ToFloat(value) / old;
  }
};

class Twin {
 public:
  Twin(const OutlierOptions& options, const Checkpoint& source)
      : options_(options), source_(source), config_(source.config()), random_(options.seed) {}

  absl::Status Write() {
    NIBBLE_RETURN_IF_ERROR(Check());
    for (const auto& [name, shape] : DenseTensors(config_)) {
      NIBBLE_ASSIGN_OR_RETURN(std::vector<BF16> values, source_.Dense(name, shape));
      tensors_[name] = {.n = shape[0], .k = shape.size() == 2 ? shape[1] : 1, .values = std::move(values)};
    }
    std::vector<LinearShape> linears = DecoderLinears(config_);
    if (!config_.tie_word_embeddings) linears.push_back(HeadLinear(config_));
    for (const LinearShape& shape : linears) {
      NIBBLE_ASSIGN_OR_RETURN(LinearTensors linear, source_.Linear(shape.name, ShardAxis::kNone, 0, 1));
      tensors_[shape.name + ".weight"] = {.n = shape.n, .k = shape.k, .values = std::move(linear.dense)};
      if (!shape.bias) continue;
      Matrix& bias = tensors_[shape.name + ".bias"];
      bias.n = shape.n;
      for (const float x : linear.bias) bias.values.push_back(ToBF16(x));
    }
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) Grow(absl::StrCat("model.layers.", layer, "."));
    return Save();
  }

 private:
  absl::Status Check() const {
    if (config_.quantization != Quantization::kBF16) {
      return absl::InvalidArgumentError(absl::StrCat(options_.model, ": is quantized already"));
    }
    const auto in_range = [](const char* name, int64_t value, int64_t limit) -> absl::Status {
      if (value >= 0 && value <= limit) return absl::OkStatus();
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", must be in 0..", limit));
    };
    NIBBLE_RETURN_IF_ERROR(
        in_range("channels", options_.channels, std::min(config_.hidden_size, config_.intermediate_size)));
    return in_range("key_pairs", options_.key_pairs, config_.head_dim / 2);
  }

  Matrix& At(const std::string& name) { return tensors_.at(name); }

  void Grow(const std::string& layer) {
    const auto norm = [&](const char* name, std::initializer_list<const char*> readers) {
      for (const int64_t channel : Choose(config_.hidden_size, options_.channels)) {
        const float factor = At(layer + name + ".weight").ScaleRow(channel, Factor());
        for (const char* reader : readers) At(layer + reader + ".weight").DivideColumn(channel, factor);
      }
    };
    norm("input_layernorm", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"});
    norm("post_attention_layernorm", {"mlp.gate_proj", "mlp.up_proj"});
    for (const int64_t channel : Choose(config_.intermediate_size, options_.channels)) {
      const float factor = Factor();
      At(layer + "mlp.up_proj.weight").ScaleRow(channel, factor);
      At(layer + "mlp.down_proj.weight").DivideColumn(channel, factor);
    }
    const int64_t d = config_.head_dim, groups = config_.num_query_groups();
    for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
      for (const int64_t pair : Choose(d / 2, options_.key_pairs)) {
        for (const int64_t channel : {pair, pair + d / 2}) {
          ScaleHeadRow(layer + "self_attn.k_proj", head * d + channel, options_.key_factor);
          for (int64_t g = 0; g < groups; ++g) {
            ScaleHeadRow(layer + "self_attn.q_proj", (head * groups + g) * d + channel, 1 / options_.key_factor);
          }
        }
      }
    }
  }

  void ScaleHeadRow(const std::string& linear, int64_t row, float factor) {
    At(linear + ".weight").ScaleRow(row, factor);
    if (config_.qkv_bias) At(linear + ".bias").ScaleRow(row, factor);
  }

  // Raw draws of the generator: the standard's distributions differ between libraries.
  float Factor() {
    const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
    return static_cast<float>(options_.factor * (0.5 + uniform));
  }
  std::vector<int64_t> Choose(int64_t n, int64_t count) {
    std::vector<int64_t> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = i + static_cast<int64_t>(random_() % static_cast<uint64_t>(n - i));
      std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(j)]);
    }
    all.resize(static_cast<size_t>(count));
    return all;
  }

  absl::Status Save() const {
    std::vector<TensorSpec> specs;
    for (const auto& [name, m] : tensors_) {
      const bool vector = name.ends_with("norm.weight") || name.ends_with(".bias");
      specs.push_back({name, TensorType::kBF16, vector ? std::vector{m.n} : std::vector{m.n, m.k}});
    }
    NIBBLE_ASSIGN_OR_RETURN(const auto writer,
                            ModelWriter::Create(options_.output, specs, {.overwrite = options_.overwrite}));
    for (const auto& [name, m] : tensors_) NIBBLE_RETURN_IF_ERROR(writer->Write(name, m.values));
    for (const char* name : kCopiedFiles) {
      const auto contents = ReadSmallFile(options_.model + "/" + name, kMaxCopiedBytes);
      if (absl::IsNotFound(contents.status())) continue;
      NIBBLE_RETURN_IF_ERROR(contents.status());
      NIBBLE_RETURN_IF_ERROR(writer->WriteFile(name, *contents));
    }
    return writer->Commit();
  }

  const OutlierOptions& options_;
  const Checkpoint& source_;
  const ModelConfig& config_;
  std::mt19937_64 random_;
  std::map<std::string, Matrix> tensors_;  // the whole model
};

}  // namespace

absl::Status WriteOutlierTwin(const OutlierOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto source, Checkpoint::Open(options.model));
  return Twin(options, *source).Write();
}

}  // namespace nibble
