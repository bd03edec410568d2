#include "common/model/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

using Json = nlohmann::json;

// One object of a config file and what to call it in messages. Absent and null mean the same, as in HF configs.
class Fields {
 public:
  Fields(const Json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const Json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  absl::Status Error(const char* key, const std::string& reason) const {
    return absl::InvalidArgumentError(absl::StrCat(file_, ": ", prefix_, key, " ", reason));
  }
  absl::Status Unsupported(const char* key, const std::string& reason) const {
    return absl::UnimplementedError(absl::StrCat(file_, ": ", prefix_, key, " ", reason));
  }
  absl::Status Missing(const char* key) const { return Error(key, "is missing"); }

  absl::StatusOr<int64_t> Integer(const char* key, const Json& value, int64_t low, int64_t high) const {
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() ||
                       value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
    if (!fits || value.get<int64_t>() < low || value.get<int64_t>() > high) {
      return Error(
          key, absl::StrCat("is ", Quoted(value.dump(-1, ' ', true)), ", must be an integer from ", low, " to ", high));
    }
    return value.get<int64_t>();
  }
  absl::Status Read(const char* key, int64_t low, int64_t high, int64_t* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return Missing(key);
    NIBBLE_ASSIGN_OR_RETURN(*out, Integer(key, *value, low, high));
    return absl::OkStatus();
  }
  // Leaves *out alone when absent.
  absl::Status ReadOptional(const char* key, double low, double high, double* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (!(number >= low && number <= high)) {
      return Error(
          key, absl::StrCat("is ", Quoted(value->dump(-1, ' ', true)), ", must be a number from ", low, " to ", high));
    }
    *out = number;
    return absl::OkStatus();
  }
  absl::Status ReadOptional(const char* key, bool* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean())
      return Error(key, absl::StrCat("is ", Quoted(value->dump(-1, ' ', true)), ", must be a boolean"));
    *out = value->get<bool>();
    return absl::OkStatus();
  }
  absl::Status ReadOptional(const char* key, std::string* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_string())
      return Error(key, absl::StrCat("is ", Quoted(value->dump(-1, ' ', true)), ", must be a string"));
    *out = value->get<std::string>();
    return absl::OkStatus();
  }
  absl::StatusOr<Fields> Object(const char* key) const {
    const Json* value = Find(key);
    if (value == nullptr) return Missing(key);
    if (!value->is_object()) return Error(key, "must be an object");
    return Fields(*value, file_, absl::StrCat(prefix_, key, "."));
  }

 private:
  const Json& object_;
  std::string file_;
  std::string prefix_;
};

constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHidden = 1 << 16;
constexpr int64_t kMaxIntermediate = 1 << 20;
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxVocab = 1 << 21;
constexpr int64_t kMaxPositions = 1 << 24;

// The architectures that are Llama's forward pass, perhaps with biases on q, k and v.
absl::Status ReadArchitecture(const Fields& fields, ModelConfig* config) {
  const Json* list = fields.Find("architectures");
  if (list == nullptr) return fields.Missing("architectures");
  if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
    return fields.Error("architectures", "must be a list of one name");
  }
  const std::string& name = list->front().get_ref<const std::string&>();
  if (name == "LlamaForCausalLM") {
    NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("attention_bias", &config->qkv_bias));
    config->o_bias = config->qkv_bias;  // HF's Llama puts attention_bias on all four projections
  } else if (name == "Qwen2ForCausalLM") {
    config->qkv_bias = true;
  } else if (name != "MistralForCausalLM") {
    return fields.Unsupported(
        "architectures",
        absl::StrCat("is ", Quoted(name), "; Nibble runs LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM"));
  }

  bool flag = false;
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("mlp_bias", &flag));
  if (flag) return fields.Unsupported("mlp_bias", "is true; biases are read on attention projections only");

  std::string activation = "silu";
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("hidden_act", &activation));
  if (activation != "silu") {
    return fields.Unsupported("hidden_act", absl::StrCat("is ", Quoted(activation), "; only \"silu\" is run"));
  }
  return absl::OkStatus();
}

absl::Status ReadDimensions(const Fields& fields, ModelConfig* config) {
  NIBBLE_RETURN_IF_ERROR(fields.Read("num_hidden_layers", 1, kMaxLayers, &config->num_layers));
  NIBBLE_RETURN_IF_ERROR(fields.Read("hidden_size", 64, kMaxHidden, &config->hidden_size));
  NIBBLE_RETURN_IF_ERROR(fields.Read("intermediate_size", 64, kMaxIntermediate, &config->intermediate_size));
  NIBBLE_RETURN_IF_ERROR(fields.Read("num_attention_heads", 1, kMaxHeads, &config->num_heads));
  NIBBLE_RETURN_IF_ERROR(fields.Read("vocab_size", 1, kMaxVocab, &config->vocab_size));
  NIBBLE_RETURN_IF_ERROR(fields.Read("max_position_embeddings", 1, kMaxPositions, &config->max_position_embeddings));

  config->num_kv_heads = config->num_heads;
  if (fields.Find("num_key_value_heads") != nullptr) {
    NIBBLE_RETURN_IF_ERROR(fields.Read("num_key_value_heads", 1, kMaxHeads, &config->num_kv_heads));
  }
  if (config->num_heads % config->num_kv_heads != 0) {
    return fields.Error("num_key_value_heads", absl::StrCat("is ", config->num_kv_heads, ", must divide the ",
                                                            config->num_heads, " attention heads"));
  }
  config->head_dim = config->hidden_size / config->num_heads;
  if (fields.Find("head_dim") != nullptr) {
    NIBBLE_RETURN_IF_ERROR(fields.Read("head_dim", 1, kMaxHidden, &config->head_dim));
  } else if (config->hidden_size % config->num_heads != 0) {
    return fields.Error("hidden_size", absl::StrCat("is ", config->hidden_size, ", must be a multiple of the ",
                                                    config->num_heads, " attention heads when head_dim is absent"));
  }
  if (config->head_dim != 64 && config->head_dim != 128) {
    return fields.Unsupported("head_dim", absl::StrCat("is ", config->head_dim, "; 64 and 128 are run"));
  }
  if (config->num_heads * config->head_dim > kMaxHidden) {
    return fields.Error("num_attention_heads",
                        absl::StrCat("x head_dim is ", config->num_heads * config->head_dim, ", at most ", kMaxHidden));
  }
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("rms_norm_eps", 1e-12, 0.1, &config->rms_norm_eps));
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("tie_word_embeddings", &config->tie_word_embeddings));
  return absl::OkStatus();
}

// Sliding windows and mixed layer types change which keys a token sees; running such a model as plain Llama would
// answer wrongly without an error.
absl::Status RefuseSlidingWindow(const Fields& fields, const ModelConfig& config) {
  if (const Json* types = fields.Find("layer_types"); types != nullptr) {
    if (!types->is_array()) return fields.Error("layer_types", "must be a list");
    for (const Json& type : *types) {
      if (type != "full_attention") {
        return fields.Unsupported(
            "layer_types", absl::StrCat("has ", Quoted(type.dump(-1, ' ', true)), "; only \"full_attention\" is run"));
      }
    }
  }
  bool used = true;  // Qwen2 writes a window it does not use
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("use_sliding_window", &used));
  const Json* window = fields.Find("sliding_window");
  if (!used || window == nullptr) return absl::OkStatus();
  NIBBLE_ASSIGN_OR_RETURN(const int64_t tokens,
                          fields.Integer("sliding_window", *window, 1, std::numeric_limits<int64_t>::max()));
  if (tokens >= config.max_position_embeddings) return absl::OkStatus();
  return fields.Unsupported("sliding_window", absl::StrCat("is ", tokens, "; only full attention is run"));
}

// Old style: rope_theta beside rope_scaling {rope_type or type, ...}. Since transformers 5: rope_parameters with both.
absl::Status ReadRope(const Fields& fields, ModelConfig* config) {
  constexpr double kMaxTheta = 1e12;
  const bool has_scaling = fields.Find("rope_scaling") != nullptr;
  const bool has_parameters = fields.Find("rope_parameters") != nullptr;
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("rope_theta", 1, kMaxTheta, &config->rope_theta));
  double partial = 1;
  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("partial_rotary_factor", 0, 1, &partial));
  if (partial != 1) return fields.Unsupported("partial_rotary_factor", "is not 1; whole heads are rotated");
  if (has_scaling && has_parameters) return fields.Error("rope_scaling", "and rope_parameters are both present");
  if (!has_scaling && !has_parameters) return absl::OkStatus();

  NIBBLE_ASSIGN_OR_RETURN(const Fields rope, fields.Object(has_parameters ? "rope_parameters" : "rope_scaling"));
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("rope_theta", 1, kMaxTheta, &config->rope_theta));
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("partial_rotary_factor", 0, 1, &partial));
  if (partial != 1) return rope.Unsupported("partial_rotary_factor", "is not 1; whole heads are rotated");
  std::string type = "default";
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("type", &type));
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("rope_type", &type));
  if (type == "default") return absl::OkStatus();
  if (type != "llama3") {
    return rope.Unsupported("rope_type", absl::StrCat("is ", Quoted(type), "; \"default\" and \"llama3\" are run"));
  }
  for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"}) {
    if (rope.Find(key) == nullptr) return rope.Missing(key);
  }
  RopeScaling scaling;
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("factor", 1, 1024, &scaling.factor));
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("low_freq_factor", 1e-3, 1024, &scaling.low_freq_factor));
  NIBBLE_RETURN_IF_ERROR(rope.ReadOptional("high_freq_factor", 1e-3, 1024, &scaling.high_freq_factor));
  NIBBLE_RETURN_IF_ERROR(
      rope.Read("original_max_position_embeddings", 1, kMaxPositions, &scaling.original_max_position));
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    return rope.Error("high_freq_factor", absl::StrCat("is ", scaling.high_freq_factor,
                                                       ", must exceed low_freq_factor ", scaling.low_freq_factor));
  }
  config->rope_scaling = scaling;
  return absl::OkStatus();
}

// bos_token_id may be a number; eos_token_id a number or a list. Ids found before are kept once.
absl::Status ReadTokenIds(const Fields& fields, ModelConfig* config) {
  const int64_t last = config->vocab_size - 1;
  if (const Json* bos = fields.Find("bos_token_id"); bos != nullptr && !config->bos_token_id) {
    NIBBLE_ASSIGN_OR_RETURN(config->bos_token_id, fields.Integer("bos_token_id", *bos, 0, last));
  }
  const Json* eos = fields.Find("eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  constexpr size_t kMaxEos = 64;
  const std::vector<Json> ids = eos->is_array() ? eos->get_ref<const Json::array_t&>() : std::vector<Json>{*eos};
  if (ids.size() > kMaxEos) {
    return fields.Error("eos_token_id", absl::StrCat("has ", ids.size(), " ids, at most ", kMaxEos));
  }
  for (const Json& id : ids) {
    NIBBLE_ASSIGN_OR_RETURN(const int64_t value, fields.Integer("eos_token_id", id, 0, last));
    auto& known = config->eos_token_ids;
    if (std::find(known.begin(), known.end(), value) == known.end()) known.push_back(value);
  }
  return absl::OkStatus();
}

absl::Status ReadQuantization(const Fields& fields, ForeignQuantization foreign, ModelConfig* config) {
  if (fields.Find("quantization_config") == nullptr) return absl::OkStatus();
  NIBBLE_ASSIGN_OR_RETURN(const Fields block, fields.Object("quantization_config"));
  std::string method;
  NIBBLE_RETURN_IF_ERROR(block.ReadOptional("quant_method", &method));
  if (method != "nibble") {
    if (foreign == ForeignQuantization::kIgnore) return absl::OkStatus();
    return block.Unsupported(
        "quant_method",
        absl::StrCat("is ", Quoted(method), "; make a checkpoint with nibble-quantize from the unquantized model, or (awq, gptq) with nibble-quantize import"));
  }
  int64_t version = 0, group = 0;
  NIBBLE_RETURN_IF_ERROR(block.Read("version", 0, std::numeric_limits<int32_t>::max(), &version));
  if (version != kQuantizedFormatVersion) {
    return block.Unsupported("version",
                             absl::StrCat("is ", version, "; this build reads version ", kQuantizedFormatVersion));
  }
  std::string mode;
  NIBBLE_RETURN_IF_ERROR(block.ReadOptional("mode", &mode));
  absl::StatusOr<Quantization> quantization = ParseQuantization(mode);
  if (!quantization.ok()) return block.Error("mode", std::string(quantization.status().message()));
  config->quantization = *quantization;
  if (config->quantization == Quantization::kBF16) return absl::OkStatus();

  NIBBLE_RETURN_IF_ERROR(block.Read("group_size", 1, 1 << 16, &group));
  if (group != 128) return block.Unsupported("group_size", absl::StrCat("is ", group, "; 128 is read"));
  if (block.Find("down_hadamard") != nullptr) {
    NIBBLE_RETURN_IF_ERROR(block.Read("down_hadamard", 0, kMaxIntermediate, &config->down_hadamard));
    const int64_t size = config->down_hadamard;
    if ((size & (size - 1)) != 0 || size == 1 || (size != 0 && config->intermediate_size % size != 0)) {
      return block.Error(
          "down_hadamard",
          absl::StrCat("is ", size, ", must be 0 or a power of two from 2 that divides ", config->intermediate_size));
    }
  }
  const std::pair<const char*, int64_t> inputs[] = {
      {"hidden_size", config->hidden_size},
      {"intermediate_size", config->intermediate_size},
      {"num_attention_heads x head_dim", config->num_heads * config->head_dim}};
  for (const auto& [name, k] : inputs) {
    if (k % 128 != 0) {
      return fields.Error(name, absl::StrCat("is ", k, ", must be a multiple of 128 in a quantized checkpoint"));
    }
  }
  return absl::OkStatus();
}

std::string DirectoryName(const std::string& dir) {
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  const std::string name = path.filename().string();
  // A directory's name is any bytes; the model's name travels in protobuf strings, which are UTF-8.
  return name.empty() || name == "." ? "model" : absl::CHexEscape(name);
}

bool IsPlainName(const std::string& name) {
  return !name.empty() && name.size() <= 256 &&
         std::none_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

}  // namespace

const char* QuantizationName(Quantization q) {
  switch (q) {
    case Quantization::kBF16:
      return "bf16";
    case Quantization::kW4A8KV4:
      return "w4a8kv4";
    case Quantization::kW4A4KV4:
      return "w4a4kv4";
  }
  return "unknown";
}

absl::StatusOr<Quantization> ParseQuantization(std::string_view name) {
  for (const Quantization q : {Quantization::kBF16, Quantization::kW4A8KV4, Quantization::kW4A4KV4}) {
    if (name == QuantizationName(q)) return q;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("is ", Quoted(name), ", must be \"w4a4kv4\", \"w4a8kv4\" or \"bf16\""));
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir, ForeignQuantization foreign) {
  const std::string path = dir + "/config.json";
  NIBBLE_ASSIGN_OR_RETURN(const Json json, ReadJsonObject(path));
  const Fields fields(json, path);
  ModelConfig config;
  NIBBLE_RETURN_IF_ERROR(ReadArchitecture(fields, &config));
  NIBBLE_RETURN_IF_ERROR(ReadDimensions(fields, &config));
  NIBBLE_RETURN_IF_ERROR(RefuseSlidingWindow(fields, config));
  NIBBLE_RETURN_IF_ERROR(ReadRope(fields, &config));
  NIBBLE_RETURN_IF_ERROR(ReadTokenIds(fields, &config));
  NIBBLE_RETURN_IF_ERROR(ReadQuantization(fields, foreign, &config));

  NIBBLE_RETURN_IF_ERROR(fields.ReadOptional("_name_or_path", &config.name));
  if (!IsPlainName(config.name)) config.name = DirectoryName(dir);

  const std::string generation_path = dir + "/generation_config.json";
  absl::StatusOr<Json> generation = ReadJsonObject(generation_path);
  if (generation.ok()) {
    NIBBLE_RETURN_IF_ERROR(ReadTokenIds(Fields(*generation, generation_path), &config));
  } else if (!absl::IsNotFound(generation.status())) {
    return generation.status();
  }
  return config;
}

}  // namespace nibble
