// Small random Llamas on disk, for tests: an HF directory of any dimensions, unquantized or quantized, deterministic in
// its seed. No tokenizer: engine tests speak token ids.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/model/checkpoint.h"
#include "common/model/config.h"
#include "common/model/writer.h"
#include "nlohmann/json.hpp"

namespace nibble::testing {

// A directory of its own under the test's temporary directory, gone with the object.
class TempDir {
 public:
  TempDir() {
    std::string name = ::testing::TempDir() + "nibble-XXXXXX";
    NIBBLE_CHECK(::mkdtemp(name.data()) != nullptr, name);
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

struct TinyModel {
  std::string architecture = "LlamaForCausalLM";
  int64_t num_layers = 2;
  int64_t hidden_size = 256;
  int64_t intermediate_size = 512;
  int64_t num_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 64;
  int64_t vocab_size = 320;
  int64_t max_position_embeddings = 1024;
  double rope_theta = 10000;
  bool llama3_rope = false;
  bool tie_word_embeddings = false;
  bool attention_bias = false;  // Llama: on q, k, v and o. Qwen2 has q, k and v biases anyway.
  Quantization quantization = Quantization::kBF16;
  bool permute_inputs = true;  // quantized: random permutations, shard-safe where rows are split
  uint64_t seed = 1;
  int64_t max_shard_bytes = int64_t{1} << 40;
};

inline nlohmann::json TinyConfigJson(const TinyModel& tiny) {
  nlohmann::json json = {{"architectures", {tiny.architecture}},
                         {"model_type", tiny.architecture == "Qwen2ForCausalLM" ? "qwen2" : "llama"},
                         {"num_hidden_layers", tiny.num_layers},
                         {"hidden_size", tiny.hidden_size},
                         {"intermediate_size", tiny.intermediate_size},
                         {"num_attention_heads", tiny.num_heads},
                         {"num_key_value_heads", tiny.num_kv_heads},
                         {"head_dim", tiny.head_dim},
                         {"vocab_size", tiny.vocab_size},
                         {"max_position_embeddings", tiny.max_position_embeddings},
                         {"rms_norm_eps", 1e-5},
                         {"rope_theta", tiny.rope_theta},
                         {"hidden_act", "silu"},
                         {"tie_word_embeddings", tiny.tie_word_embeddings},
                         {"attention_bias", tiny.attention_bias},
                         {"bos_token_id", 0},
                         {"eos_token_id", 1}};
  if (tiny.llama3_rope) {
    json["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", tiny.max_position_embeddings / 8}};
  }
  if (tiny.quantization != Quantization::kBF16) {
    json["quantization_config"] = {{"quant_method", "nibble"},
                                   {"version", kQuantizedFormatVersion},
                                   {"mode", QuantizationName(tiny.quantization)},
                                   {"group_size", 128}};
  }
  return json;
}

// The ModelConfig that loading WriteTinyModel's directory gives (but for the name).
inline ModelConfig TinyConfig(const TinyModel& tiny) {
  ModelConfig config;
  config.num_layers = tiny.num_layers;
  config.hidden_size = tiny.hidden_size;
  config.intermediate_size = tiny.intermediate_size;
  config.num_heads = tiny.num_heads;
  config.num_kv_heads = tiny.num_kv_heads;
  config.head_dim = tiny.head_dim;
  config.vocab_size = tiny.vocab_size;
  config.max_position_embeddings = tiny.max_position_embeddings;
  config.rope_theta = tiny.rope_theta;
  if (tiny.llama3_rope) config.rope_scaling = RopeScaling{8, 1, 4, tiny.max_position_embeddings / 8};
  config.tie_word_embeddings = tiny.tie_word_embeddings;
  config.qkv_bias = tiny.attention_bias || tiny.architecture == "Qwen2ForCausalLM";
  config.o_bias = tiny.attention_bias && tiny.architecture == "LlamaForCausalLM";
  config.bos_token_id = 0;
  config.eos_token_ids = {1};
  config.quantization = tiny.quantization;
  return config;
}

// Writes the model as directory `dir`, which must not exist.
inline absl::Status WriteTinyModel(const TinyModel& tiny, const std::string& dir) {
  const ModelConfig config = TinyConfig(tiny);
  const bool quantized = tiny.quantization != Quantization::kBF16;
  std::vector<LinearShape> linears = DecoderLinears(config);
  if (!tiny.tie_word_embeddings) linears.push_back(HeadLinear(config));

  std::vector<TensorSpec> specs;
  for (const auto& [name, shape] : DenseTensors(config)) specs.push_back({name, TensorType::kBF16, shape});
  for (const LinearShape& l : linears) {
    if (quantized && l.name != "lm_head") {
      specs.push_back({l.name + ".qweight", TensorType::kU8, {l.n, l.k / 2}});
      specs.push_back({l.name + ".group_scale", TensorType::kU8, {l.n, l.k / 128}});
      specs.push_back({l.name + ".group_min", TensorType::kI8, {l.n, l.k / 128}});
      specs.push_back({l.name + ".channel_scale", TensorType::kF32, {l.n}});
      specs.push_back({l.name + ".block_bits", TensorType::kU8, {l.k / 128}});
      if (tiny.permute_inputs) specs.push_back({l.name + ".input_perm", TensorType::kI32, {l.k}});
    } else {
      specs.push_back({l.name + ".weight", TensorType::kBF16, {l.n, l.k}});
    }
    if (l.bias) specs.push_back({l.name + ".bias", TensorType::kBF16, {l.n}});
  }
  ModelWriterOptions options;
  options.max_shard_bytes = tiny.max_shard_bytes;
  NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<ModelWriter> writer, ModelWriter::Create(dir, specs, options));

  // Raw mt19937_64 draws only: the standard's distributions differ between libraries, these bytes must not.
  std::mt19937_64 random(tiny.seed);
  const auto uniform = [&random] { return static_cast<float>(random() >> 40) * 0x1p-24f * 2 - 1; };  // [-1, 1)
  const auto below = [&random](uint64_t n) { return static_cast<int64_t>(random() % n); };
  const auto dense = [&](const std::string& name, int64_t count, float center, float spread) {
    std::vector<BF16> values(static_cast<size_t>(count));
    for (BF16& v : values) v = ToBF16(center + spread * uniform());
    return writer->Write(name, values);
  };
  for (const auto& [name, shape] : DenseTensors(config)) {
    const bool norm = shape.size() == 1;
    NIBBLE_RETURN_IF_ERROR(dense(name, norm ? shape[0] : shape[0] * shape[1], norm ? 1 : 0, norm ? 0.25f : 1));
  }

  std::string coded_input;  // linears that read one input share its coding
  std::vector<uint8_t> block_bits;
  std::vector<int32_t> perm;
  for (const LinearShape& l : linears) {
    if (l.bias) NIBBLE_RETURN_IF_ERROR(dense(l.name + ".bias", l.n, 0, 0.1f));
    if (!quantized || l.name == "lm_head") {
      NIBBLE_RETURN_IF_ERROR(dense(l.name + ".weight", l.n * l.k, 0, std::sqrt(3.0f / static_cast<float>(l.k))));
      continue;
    }
    const size_t blocks = static_cast<size_t>(l.k / 128);
    if (l.input != coded_input) {
      coded_input = l.input;
      block_bits.assign(blocks, tiny.quantization == Quantization::kW4A8KV4 ? 8 : 4);
      block_bits[static_cast<size_t>(below(blocks))] = 8;
      perm.resize(static_cast<size_t>(l.k));
      const int64_t segment = l.axis == ShardAxis::kRows ? l.k / RowSegments(config) : l.k;
      for (int64_t i = 0; i < l.k; ++i) perm[static_cast<size_t>(i)] = static_cast<int32_t>(i);
      for (int64_t i = 0; i < l.k; ++i) {  // Fisher-Yates inside each segment
        const int64_t begin = i / segment * segment;
        const int64_t j = begin + below(static_cast<uint64_t>(i - begin + 1));
        std::swap(perm[static_cast<size_t>(i)], perm[static_cast<size_t>(j)]);
      }
    }
    std::vector<uint8_t> qweight(static_cast<size_t>(l.n * l.k / 2));
    for (uint8_t& q : qweight) q = static_cast<uint8_t>(random() >> 56);
    std::vector<uint8_t> group_scale(static_cast<size_t>(l.n) * blocks);
    std::vector<int8_t> group_min(group_scale.size());
    for (size_t i = 0; i < group_scale.size(); ++i) {
      group_scale[i] = static_cast<uint8_t>(1 + below(15));
      group_min[i] = static_cast<int8_t>(-(group_scale[i] * 15 / 2) + below(7) - 3);
    }
    std::vector<float> channel_scale(static_cast<size_t>(l.n));
    for (float& s : channel_scale) s = (1 + 0.25f * uniform()) / (40 * std::sqrt(static_cast<float>(l.k)));
    NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".qweight", qweight));
    NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".group_scale", group_scale));
    NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".group_min", group_min));
    NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".channel_scale", channel_scale));
    NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".block_bits", block_bits));
    if (tiny.permute_inputs) NIBBLE_RETURN_IF_ERROR(writer->Write(l.name + ".input_perm", perm));
  }
  NIBBLE_RETURN_IF_ERROR(writer->WriteFile("config.json", TinyConfigJson(tiny).dump(2) + "\n"));
  return writer->Commit();
}

}  // namespace nibble::testing
