#include "common/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "tests/model/tiny_model.h"

namespace nibble {
namespace {

using ::nibble::testing::TempDir;
using ::nibble::testing::TinyConfigJson;
using ::nibble::testing::TinyModel;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

absl::StatusOr<ModelConfig> Load(const std::string& text, const std::string& generation = "") {
  TempDir dir;
  std::ofstream(dir / "config.json") << text;
  if (!generation.empty()) std::ofstream(dir / "generation_config.json") << generation;
  return LoadModelConfig(dir.path());
}

// A valid config with one edit.
absl::StatusOr<ModelConfig> LoadEdited(const std::function<void(Json&)>& edit) {
  Json json = TinyConfigJson(TinyModel{});
  edit(json);
  return Load(json.dump());
}

TEST(Config, ReadsTheBundledModel) {
  const absl::StatusOr<ModelConfig> config = LoadModelConfig("deploy/models/novelist-17m");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->name, "novelist-17m");
  EXPECT_EQ(config->num_layers, 4);
  EXPECT_EQ(config->hidden_size, 512);
  EXPECT_EQ(config->intermediate_size, 1536);
  EXPECT_EQ(config->num_heads, 4);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->num_query_groups(), 2);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->vocab_size, 4096);
  EXPECT_EQ(config->rope_theta, 500000);
  EXPECT_FALSE(config->rope_scaling.has_value());
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_EQ(config->bos_token_id, 0);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1));
  EXPECT_EQ(config->quantization, Quantization::kBF16);
}

TEST(Config, ReadsLlama31Scaling) {
  const auto config = Load(TinyConfigJson({.llama3_rope = true}).dump());
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_TRUE(config->rope_scaling.has_value());
  EXPECT_EQ(config->rope_scaling->factor, 8);
  EXPECT_EQ(config->rope_scaling->original_max_position, 128);
}

TEST(Config, ReadsNewStyleRopeParameters) {
  const auto config = LoadEdited([](Json& json) {
    json.erase("rope_theta");
    json["rope_parameters"] = {{"rope_theta", 1e6},       {"rope_type", "llama3"},
                               {"factor", 32.0},          {"low_freq_factor", 1.0},
                               {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  });
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_theta, 1e6);
  EXPECT_EQ(config->rope_scaling->factor, 32);
}

TEST(Config, BiasesFollowTheArchitecture) {
  const auto llama = LoadEdited([](Json& json) { json["attention_bias"] = true; });
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_TRUE(llama->qkv_bias);
  EXPECT_TRUE(llama->o_bias);
  const auto qwen = LoadEdited([](Json& json) {
    json["architectures"] = {"Qwen2ForCausalLM"};
    json["use_sliding_window"] = false;
    json["sliding_window"] = 128;
  });
  ASSERT_TRUE(qwen.ok()) << qwen.status();
  EXPECT_TRUE(qwen->qkv_bias);
  EXPECT_FALSE(qwen->o_bias);
}

TEST(Config, DerivesWhatOldConfigsLeaveOut) {
  const auto config = LoadEdited([](Json& json) {
    json.erase("head_dim");
    json.erase("num_key_value_heads");
    json.erase("hidden_act");
    json["sliding_window"] = nullptr;
    json["rope_scaling"] = nullptr;
  });
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->num_kv_heads, 4);
}

TEST(Config, CollectsEndTokensOfBothFiles) {
  Json json = TinyConfigJson(TinyModel{});
  json["eos_token_id"] = {2, 3};
  const auto config = Load(json.dump(), R"({"eos_token_id": [3, 9], "bos_token_id": 7})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2, 3, 9));
  EXPECT_EQ(config->bos_token_id, 0);
}

TEST(Config, ReadsOurQuantizationBlock) {
  const auto config = Load(TinyConfigJson({.quantization = Quantization::kW4A4KV4}).dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->quantization, Quantization::kW4A4KV4);
}

TEST(Config, RefusesWhatItDoesNotRun) {
  const struct {
    const char* what;
    std::function<void(Json&)> edit;
    const char* message;
  } cases[] = {
      {"architecture", [](Json& j) { j["architectures"] = {"GPT2LMHeadModel"}; }, "GPT2LMHeadModel"},
      {"activation", [](Json& j) { j["hidden_act"] = "gelu"; }, "hidden_act"},
      {"mlp bias", [](Json& j) { j["mlp_bias"] = true; }, "mlp_bias"},
      {"head size", [](Json& j) { j["head_dim"] = 96; }, "head_dim is 96"},
      {"yarn",
       [](Json& j) {
         j["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}};
       },
       "yarn"},
      {"linear",
       [](Json& j) {
         j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 4.0}};
       },
       "linear"},
      {"window", [](Json& j) { j["sliding_window"] = 512; }, "sliding_window is 512"},
      {"mixed layers",
       [](Json& j) {
         j["layer_types"] = {"full_attention", "sliding_attention"};
       },
       "sliding_attention"},
      {"partial rotation", [](Json& j) { j["partial_rotary_factor"] = 0.5; }, "partial_rotary_factor"},
      {"foreign quantization",
       [](Json& j) {
         j["quantization_config"] = {{"quant_method", "awq"}};
       },
       "awq"},
      {"newer format",
       [](Json& j) {
         j["quantization_config"] = {{"quant_method", "nibble"}, {"version", 2}, {"mode", "w4a4kv4"}};
       },
       "version is 2"},
  };
  for (const auto& c : cases) {
    const auto config = LoadEdited(c.edit);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kUnimplemented) << c.what << ": " << config.status();
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(c.message)) << c.what;
    EXPECT_THAT(std::string(config.status().message()), HasSubstr("config.json")) << c.what;
  }
}

TEST(Config, RefusesValuesOutOfRange) {
  const struct {
    const char* key;
    Json value;
  } cases[] = {
      {"num_hidden_layers", 0},
      {"num_hidden_layers", 1025},
      {"num_hidden_layers", "4"},
      {"num_hidden_layers", 4.0},
      {"num_hidden_layers", nullptr},
      {"hidden_size", -256},
      {"hidden_size", 1 << 20},
      {"intermediate_size", int64_t{1} << 40},
      {"intermediate_size", 18446744073709551615u},
      {"num_attention_heads", 0},
      {"num_key_value_heads", 3},
      {"vocab_size", 0},
      {"vocab_size", int64_t{1} << 32},
      {"max_position_embeddings", 0},
      {"rms_norm_eps", 0},
      {"rms_norm_eps", 1},
      {"rms_norm_eps", "small"},
      {"rope_theta", -1},
      {"rope_theta", 1e300},
      {"tie_word_embeddings", "yes"},
      {"bos_token_id", 320},
      {"eos_token_id", {1, -1}},
      {"eos_token_id", "x"},
      {"architectures", "LlamaForCausalLM"},
      {"architectures", Json::array()},
      {"rope_scaling", 7},
      {"quantization_config", "nibble"},
      {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}},
      {"rope_scaling",
       {{"rope_type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 4.0},
        {"high_freq_factor", 4.0},
        {"original_max_position_embeddings", 128}}},
      {"quantization_config", {{"quant_method", "nibble"}, {"version", 1}, {"mode", "w2"}, {"group_size", 128}}},
      {"quantization_config",
       {{"quant_method", "nibble"}, {"version", 1}, {"mode", "w4a4kv4"}, {"group_size", 128}, {"down_hadamard", 3}}},
  };
  for (const auto& c : cases) {
    const auto config = LoadEdited([&](Json& json) { json[c.key] = c.value; });
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument)
        << c.key << " = " << c.value << ": " << config.status();
    EXPECT_THAT(std::string(config.status().message()), HasSubstr("config.json")) << c.key;
  }
}

TEST(Config, RefusesTextThatIsNotAConfig) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("{}"), std::string("\xff\xfe"),
        std::string(100000, '['), std::string("{\"vocab_size\": 1, \"vocab_size\": 2}")}) {
    const auto config = Load(text);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 40) << config.status();
  }
  EXPECT_EQ(LoadModelConfig("/nonexistent").status().code(), absl::StatusCode::kNotFound);
  TempDir dir;
  std::filesystem::create_directory(dir / "config.json");
  EXPECT_FALSE(LoadModelConfig(dir.path()).ok());
}

TEST(Config, QuantizationNamesRoundTrip) {
  for (const Quantization q : {Quantization::kBF16, Quantization::kW4A8KV4, Quantization::kW4A4KV4}) {
    EXPECT_EQ(*ParseQuantization(QuantizationName(q)), q);
  }
  EXPECT_FALSE(ParseQuantization("W4A4KV4").ok());
}

}  // namespace
}  // namespace nibble
