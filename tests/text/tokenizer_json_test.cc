// Broken, hostile and unsupported tokenizer files: always a status that names the field, never a crash.
#include "common/text/tokenizer_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/text/tokenizer.h"
#include "common/text/vocabulary.h"
#include "tests/text/fixtures.h"

namespace nibble {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

const Json& Original() {
  static const Json original = Json::parse(ReadText("tests/text/data/gpt2.tokenizer.json"));
  return original;
}

absl::Status LoadStatus(const Json& json) { return Tokenizer::FromJson(json.dump()).status(); }

TEST(TokenizerJsonTest, TheOriginalLoads) { EXPECT_TRUE(LoadStatus(Original()).ok()) << LoadStatus(Original()); }

struct Case {
  const char* pointer;      // what is replaced
  const char* replacement;  // JSON; "" removes it
  absl::StatusCode code;
  const char* message;
};

TEST(TokenizerJsonTest, EveryFieldIsChecked) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  const std::vector<Case> cases = {
      {"/truncation", "{}", kUnimplemented, "truncation"},
      {"/padding", "{\"strategy\":\"BatchLongest\"}", kUnimplemented, "padding"},
      {"/normalizer", "{\"type\":\"Lowercase\"}", kUnimplemented, "normalizer Lowercase"},
      {"/normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\"}]}", kUnimplemented, "Strip"},
      {"/normalizer", "{\"type\":\"Sequence\"}", kInvalid, "normalizers"},
      {"/normalizer", "3", kInvalid, "normalizer"},
      {"/normalizer", "{}", kInvalid, "normalizer.type"},
      {"/pre_tokenizer", "null", kUnimplemented, "pre_tokenizer null"},
      {"/pre_tokenizer", "", kUnimplemented, "pre_tokenizer"},
      {"/pre_tokenizer", "{\"type\":\"Whitespace\"}", kUnimplemented, "Whitespace"},
      {"/pre_tokenizer", "{\"type\":\"Metaspace\"}", kUnimplemented, "Metaspace"},
      {"/pre_tokenizer", "{\"type\":\"Digits\"}", kUnimplemented, "without ByteLevel"},
      {"/pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[]}", kUnimplemented, "without ByteLevel"},
      {"/pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":{}}", kInvalid, "pretokenizers"},
      {"/pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":\"Digits\"}]}",
       kUnimplemented, "Digits behind ByteLevel"},
      {"/pre_tokenizer", "{\"type\":\"ByteLevel\",\"use_regex\":1}", kInvalid, "use_regex"},
      {"/pre_tokenizer",
       "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},"
       "\"behavior\":\"MergedWithNext\",\"invert\":false},{\"type\":\"ByteLevel\"}]}",
       kUnimplemented, "behavior MergedWithNext"},
      {"/pre_tokenizer",
       "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a\"},"
       "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\"}]}",
       kInvalid, "stage 0: regular expression"},
      {"/pre_tokenizer",
       "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":\"a\","
       "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\"}]}",
       kInvalid, "pattern"},
      {"/pre_tokenizer",
       "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":\"\"},"
       "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\"}]}",
       kInvalid, "pattern"},
      {"/post_processor", "{\"type\":\"RobertaProcessing\"}", kUnimplemented, "RobertaProcessing"},
      {"/post_processor", "{\"type\":\"TemplateProcessing\"}", kInvalid, "single"},
      {"/post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[]}", kInvalid, "Sequence A once"},
      {"/post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[7]}", kInvalid, "single"},
      {"/post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"B\"}}]}", kInvalid,
       "Sequence A once"},
      {"/post_processor",
       "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],"
       "\"special_tokens\":{}}",
       kInvalid, "special_tokens"},
      {"/post_processor",
       "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],"
       "\"special_tokens\":{\"x\":{\"ids\":[2000000]}}}",
       kInvalid, "token id 2000000, which names no token"},
      {"/decoder", "null", kUnimplemented, "decoder null"},
      {"/decoder", "{\"type\":\"WordPiece\"}", kUnimplemented, "decoder WordPiece"},
      {"/added_tokens", "{}", kInvalid, "added_tokens"},
      {"/added_tokens/0", "[]", kInvalid, "added_tokens[0]"},
      {"/added_tokens/0/content", "\"\"", kInvalid, "added_tokens[0].content"},
      {"/added_tokens/0/content", "5", kInvalid, "added_tokens[0].content"},
      {"/added_tokens/0/content", "\"a\"", kInvalid, "in model.vocab"},
      {"/added_tokens/0/id", "1", kInvalid, "in model.vocab"},
      {"/added_tokens/0/id", "-1", kInvalid, "added_tokens[0].id"},
      {"/added_tokens/0/id", "1.5", kInvalid, "added_tokens[0].id"},
      {"/added_tokens/0/id", "4294967296", kInvalid, "added_tokens[0].id"},
      {"/added_tokens/0/id", "", kInvalid, "added_tokens[0].id"},
      {"/added_tokens/0/single_word", "true", kUnimplemented, "single_word"},
      {"/added_tokens/0/special", "\"yes\"", kInvalid, "special"},
      {"/added_tokens/1", "{\"id\":0,\"content\":\"<|endoftext|>\"}", kInvalid, "occurs twice"},
      {"/added_tokens/1", "{\"id\":5,\"content\":\"new token\"}", kInvalid, "has the id of another token"},
      {"/model", "null", kInvalid, "model"},
      {"/model/type", "\"Unigram\"", kUnimplemented, "model.type Unigram"},
      {"/model/type", "7", kInvalid, "model.type"},
      {"/model/byte_fallback", "true", kUnimplemented, "byte_fallback"},
      {"/model/dropout", "0.1", kUnimplemented, "dropout"},
      {"/model/continuing_subword_prefix", "\"##\"", kUnimplemented, "continuing_subword_prefix"},
      {"/model/end_of_word_suffix", "\"</w>\"", kUnimplemented, "end_of_word_suffix"},
      {"/model/ignore_merges", "0", kInvalid, "ignore_merges"},
      {"/model/vocab", "[]", kInvalid, "model.vocab"},
      {"/model/vocab", "{}", kInvalid, "model.vocab"},
      {"/model/vocab/a", "\"1\"", kInvalid, "model.vocab[\"a\"]"},
      {"/model/vocab/a", "-1", kInvalid, "model.vocab[\"a\"]"},
      {"/model/vocab/a", "1e3", kInvalid, "model.vocab[\"a\"]"},
      {"/model/vocab/a", "2097152", kInvalid, "from 0 to 2097151"},
      {"/model/vocab/a", "18446744073709551615", kInvalid, "from 0 to 2097151"},
      {"/model/vocab/a", "7", kInvalid, "token id 7 is used twice"},
      {"/model/vocab/a", "", kInvalid, "no token for byte 97"},
      {"/model/merges", "{}", kInvalid, "model.merges"},
      {"/model/merges/0", "[\"a\"]", kInvalid, "model.merges[0]"},
      {"/model/merges/0", "[\"a\",1]", kInvalid, "model.merges[0]"},
      {"/model/merges/0", "\"a b c\"", kInvalid, "model.merges[0]"},
      {"/model/merges/0", "\"ab\"", kInvalid, "model.merges[0]"},
      {"/model/merges/0", "null", kInvalid, "model.merges[0]"},
      {"/model/merges/0", "[\"a\",\"nowhere\"]", kInvalid, "model.merges[0] names \"nowhere\""},
      {"/model/merges/0", "[\"<\",\"}\"]", kInvalid, "model.merges[0] makes"},
  };
  for (const Case& c : cases) {
    Json json = Original();
    const Json::json_pointer pointer(c.pointer);
    if (c.replacement[0] == '\0') {
      json[pointer.parent_pointer()].erase(pointer.back());
    } else {
      json[pointer] = Json::parse(c.replacement);
    }
    const absl::Status status = LoadStatus(json);
    EXPECT_EQ(status.code(), c.code) << c.pointer << " = " << c.replacement << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message)) << c.pointer << " = " << c.replacement;
  }
}

TEST(TokenizerJsonTest, AddedTokensAreCheckedAfterNormalization) {
  const auto status = [](const std::string& first, const std::string& second, bool normalized) {
    Json json = Original();
    json["normalizer"] = {{"type", "NFC"}};
    json["added_tokens"].push_back({{"id", 800}, {"content", first}, {"normalized", normalized}});
    json["added_tokens"].push_back({{"id", 801}, {"content", second}, {"normalized", normalized}});
    return LoadStatus(json);
  };
  EXPECT_TRUE(status("<é>", "<e\u0301>", false).ok());
  EXPECT_THAT(std::string(status("<é>", "<e\u0301>", true).message()),
              HasSubstr("occurs twice in Normalization Form C"));
  std::string expanding;  // each of these becomes twice as long
  while (expanding.size() + 3 <= kMaxAddedTokenBytes) expanding += "\u0958";
  EXPECT_TRUE(status(expanding, "x y", false).ok());
  EXPECT_THAT(std::string(status(expanding, "x y", true).message()), HasSubstr("too long"));
}

TEST(TokenizerJsonTest, HarmlessVariantsLoad) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"/normalizer", "{\"type\":\"Sequence\",\"normalizers\":[]}"},
      {"/normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}"},
      {"/model/type", "null"},
      {"/model/unk_token", "\"<|endoftext|>\""},
      {"/model/fuse_unk", "true"},
      {"/model/dropout", "0.0"},
      {"/model/continuing_subword_prefix", "\"\""},
      {"/added_tokens", "[]"},
      {"/added_tokens/0/id", "0"},
      {"/added_tokens/1", "{\"id\":2097151,\"content\":\"far away\"}"},
      {"/post_processor", "null"},
      {"/model/merges", "[\"#version: 0.2\"]"},
  };
  for (const auto& [pointer, replacement] : cases) {
    Json json = Original();
    json[Json::json_pointer(pointer)] = Json::parse(replacement);
    EXPECT_TRUE(LoadStatus(json).ok()) << pointer << " = " << replacement << ": " << LoadStatus(json);
  }
}

TEST(TokenizerJsonTest, BrokenJsonIsInvalid) {
  const std::string whole = ReadText("tests/text/data/gpt2.tokenizer.json");
  const size_t end = whole.find_last_of('}');
  for (size_t length = 0; length <= end; length += 97)
    EXPECT_EQ(Tokenizer::FromJson(whole.substr(0, length)).status().code(), absl::StatusCode::kInvalidArgument)
        << length;
  EXPECT_FALSE(Tokenizer::FromJson(whole.substr(0, end)).ok());
  for (const std::string& text :
       {std::string("[]"), std::string("null"), std::string("{}x"), std::string("{\"a\":1e999}"),
        std::string("{\"model\":\"\xff\"}"), std::string("{\"a\":\"\\ud800\"}"), std::string(1'000'000, '['),
        "{\"a\":" + std::string(65, '[') + std::string(65, ']') + "}"})
    EXPECT_EQ(Tokenizer::FromJson(text).status().code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 20);
}

TEST(TokenizerJsonTest, ReadsBosToken) {
  EXPECT_EQ(ParseBosToken("{}").value(), "");
  EXPECT_EQ(ParseBosToken("{\"bos_token\":null}").value(), "");
  EXPECT_EQ(ParseBosToken("{\"bos_token\":\"<s>\"}").value(), "<s>");
  EXPECT_EQ(ParseBosToken("{\"bos_token\":{\"content\":\"<s>\",\"lstrip\":false}}").value(), "<s>");
  for (const char* text : {"", "[]", "{\"bos_token\":1}", "{\"bos_token\":{}}", "{\"bos_token\":{\"content\":[]}}"})
    EXPECT_EQ(ParseBosToken(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
}

}  // namespace
}  // namespace nibble
