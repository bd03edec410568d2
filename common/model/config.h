// The model as its config.json describes it (Llama family, HF layout).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

// Llama-3.1 frequency scaling; absent for plain RoPE.
struct RopeScaling {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  int64_t original_max_position = 8192;
};

// Of the quantized layout (docs/formats.md), in quantization_config.version.
inline constexpr int64_t kQuantizedFormatVersion = 1;

enum class Quantization : uint8_t { kBF16, kW4A8KV4, kW4A4KV4 };
const char* QuantizationName(Quantization q);  // "bf16", "w4a8kv4", "w4a4kv4"
absl::StatusOr<Quantization> ParseQuantization(std::string_view name);

// What LoadModelConfig does with a quantization_config that is not Nibble's. kIgnore is for importing: the config then
// says kBF16.
enum class ForeignQuantization : uint8_t { kRefuse, kIgnore };

struct ModelConfig {
  std::string name;  // the directory's name unless config.json has _name_or_path
  int64_t num_layers = 0;
  int64_t hidden_size = 0;        // H
  int64_t intermediate_size = 0;  // F
  int64_t num_heads = 0;          // query heads
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;  // D: 64 or 128
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-5;
  double rope_theta = 10000;
  std::optional<RopeScaling> rope_scaling;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;  // Qwen2, or Llama with attention_bias
  bool o_bias = false;    // Llama with attention_bias
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;               // config.json and generation_config.json together
  Quantization quantization = Quantization::kBF16;  // from quantization_config
  int64_t down_hadamard = 0;                        // online block-Hadamard in front of down_proj, 0 = none

  int64_t num_query_groups() const { return num_heads / num_kv_heads; }
};

// Reads DIR/config.json (and generation_config.json when present). NOT_FOUND, INVALID_ARGUMENT with file, field,
// value and limit, or UNIMPLEMENTED for an architecture, rope type or quantization Nibble does not run; every field is
// range-checked.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir,
                                            ForeignQuantization foreign = ForeignQuantization::kRefuse);

}  // namespace nibble
