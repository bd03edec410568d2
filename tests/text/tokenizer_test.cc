#include "common/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/text/fixtures.h"

namespace nibble {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<uint32_t> Encode(const Tokenizer& tokenizer, std::string_view text, EncodeOptions options = {}) {
  const auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : std::vector<uint32_t>();
}

TEST(TokenizerTest, LoadsTheBundledModel) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  EXPECT_EQ(tokenizer->vocab_size(), 4096u);
  EXPECT_EQ(tokenizer->bos_id(), 0u);
  EXPECT_EQ(tokenizer->TokenToId("<|eot_id|>"), 4u);
  EXPECT_EQ(tokenizer->TokenToId("no such token"), std::nullopt);
  EXPECT_TRUE(tokenizer->IsSpecial(4));
  EXPECT_FALSE(tokenizer->IsSpecial(5));
  EXPECT_FALSE(tokenizer->IsSpecial(4096));
  EXPECT_TRUE(tokenizer->IsKnown(4095));
  EXPECT_FALSE(tokenizer->IsKnown(4096));
  EXPECT_FALSE(tokenizer->IsKnown(UINT32_MAX));
  EXPECT_EQ(tokenizer->TokenBytes(4), "<|eot_id|>");
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->TokenToId("Ġthe")), " the");
  EXPECT_EQ(tokenizer->TokenBytes(4096), "");
  EXPECT_TRUE(tokenizer->IsWholeUtf8(*tokenizer->TokenToId("Ġthe")));
  EXPECT_FALSE(tokenizer->IsWholeUtf8(*tokenizer->TokenToId("â")));
}

TEST(TokenizerTest, SpecialTokensActOnlyWhenAsked) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  EXPECT_THAT(Encode(*tokenizer, ""), ElementsAre(0));
  EXPECT_THAT(Encode(*tokenizer, "", {.add_special_tokens = false}), IsEmpty());
  EXPECT_THAT(Encode(*tokenizer, "<|eot_id|>"), ElementsAre(0, 4));
  for (const uint32_t id :
       Encode(*tokenizer, "<|eot_id|>", {.add_special_tokens = false, .parse_special_tokens = false}))
    EXPECT_FALSE(tokenizer->IsSpecial(id));
}

TEST(TokenizerTest, InvalidUtf8IsRefusedWithItsOffset) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  const absl::Status status = tokenizer->Encode("caf\xC3\xA9 \xE2\x82").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("byte 6"));
}

TEST(TokenizerTest, DecodeNamesUnknownIds) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  EXPECT_EQ(tokenizer->Decode({}).value(), "");
  const absl::Status status = tokenizer->Decode(std::vector<uint32_t>{5, 4096}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("token id 4096 at position 1"));
}

TEST(TokenizerTest, EveryTextSurvivesTheRoundTrip) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  const std::string text = ReadText("deploy/models/text/heldout.txt");
  const std::vector<uint32_t> ids = Encode(*tokenizer, text);
  EXPECT_LT(ids.size(), text.size() / 3);
  EXPECT_EQ(tokenizer->Decode(ids).value(), text);
}

TEST(TokenizerTest, BosComesFromTheConfigWhenNothingElseNamesIt) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / "nibble_tokenizer_test";
  std::filesystem::create_directories(dir);
  std::filesystem::copy_file("tests/text/data/gpt2.tokenizer.json", dir / "tokenizer.json",
                             std::filesystem::copy_options::overwrite_existing);
  const auto write_config = [&](const std::string& text) { std::ofstream(dir / "tokenizer_config.json") << text; };
  std::filesystem::remove(dir / "tokenizer_config.json");
  EXPECT_EQ((*Tokenizer::Load(dir))->bos_id(), std::nullopt);
  write_config("{\"bos_token\":\"<|endoftext|>\"}");
  EXPECT_EQ((*Tokenizer::Load(dir))->bos_id(), 0u);
  write_config("{\"bos_token\":\"nowhere\"}");
  EXPECT_EQ((*Tokenizer::Load(dir))->bos_id(), std::nullopt);
  write_config("{");
  EXPECT_THAT(std::string(Tokenizer::Load(dir).status().message()), HasSubstr("tokenizer_config.json"));
  std::filesystem::remove(dir / "tokenizer.json");
  EXPECT_EQ(Tokenizer::Load(dir).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::create_directory(dir / "tokenizer.json");
  EXPECT_EQ(Tokenizer::Load(dir).status().code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove_all(dir);
}

TEST(TokenizerTest, ThreadsShareOneTokenizer) {
  const auto tokenizer = LoadFixtureTokenizer("llama3");
  const std::string text = ReadText("deploy/models/text/heldout.txt").substr(0, 20'000);
  const std::vector<uint32_t> expected = Encode(*tokenizer, text);
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (int& result : equal)
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        const auto ids = tokenizer->Encode(text);
        result += ids.ok() && *ids == expected && *tokenizer->Decode(*ids) == text;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(equal, ElementsAre(10, 10, 10, 10));
}

// This much of anything takes a fraction of a second; anything quadratic would take minutes each. The bound leaves room for
// sanitizers on a busy machine.
TEST(TokenizerTest, NoTextTakesSuperLinearTime) {
  const auto start = std::chrono::steady_clock::now();
  for (const char* name : {"llama3", "gpt2", "gpt2_prefix", "stages"}) {
    const auto tokenizer = LoadFixtureTokenizer(name);
    for (const std::string unit :
         {"a",  "A",  " ",   "\n", " \n", "\r\n\t", "7",          "!",       "'",      "é",    "\u0301",
          "漢", "ab", "the", "<",  "<|",  "<tool",  "<|eot_id|>", "<mask> ", "\u3000", "\x01", "😀\u200d"}) {
      std::string text;
      while (text.size() < 400'000) text += unit;
      const auto ids = tokenizer->Encode(text);
      EXPECT_TRUE(ids.ok()) << name << " " << unit << ids.status();
    }
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(240));
}

TEST(TokenizerTest, HostilePatternFailsTheCallOnly) {
  std::string json = ReadText("tests/text/data/gpt2.tokenizer.json");
  const std::string byte_level = "\"pre_tokenizer\":{\"type\":\"ByteLevel\"";
  const size_t at = json.find(byte_level);
  ASSERT_NE(at, std::string::npos);
  const size_t end = json.find('}', at) + 1;
  const std::string stage = json.substr(at + 16, end - at - 16);
  json.replace(at, end - at,
               "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
               "{\"Regex\":\"(a+)+$|b\"},\"behavior\":\"Isolated\",\"invert\":false}," +
                   stage + "]}");
  const auto tokenizer = Tokenizer::FromJson(json);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode(std::string(64, 'a') + "!").status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE((*tokenizer)->Encode("b b").ok());
}

}  // namespace
}  // namespace nibble
