// Equality with the reference implementation over the fixtures of make_fixtures.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/text/detokenizer.h"
#include "common/text/tokenizer.h"
#include "tests/text/fixtures.h"

namespace nibble {
namespace {

std::vector<std::string> ReadTexts() {
  std::vector<std::string> texts;
  for (const std::string& line : ReadLines("tests/text/data/texts.jsonl"))
    texts.push_back(nlohmann::json::parse(line).get<std::string>());
  return texts;
}

std::vector<std::string> EveryNth(const std::vector<std::string>& texts, size_t step) {
  std::vector<std::string> result;
  for (size_t i = 0; i < texts.size(); i += step) result.push_back(texts[i]);
  return result;
}

class ReferenceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    tokenizer_ = LoadFixtureTokenizer(GetParam());
    ASSERT_NE(tokenizer_, nullptr);
  }

  void ExpectEqualIds(const std::vector<std::string>& texts, const std::string& suffix, EncodeOptions options) {
    const std::vector<std::string> expected = ReadLines(std::string("tests/text/data/") + GetParam() + suffix);
    ASSERT_EQ(expected.size(), texts.size());
    int differing = 0;
    for (size_t i = 0; i < texts.size() && differing < 10; ++i) {
      const auto ids = tokenizer_->Encode(texts[i], options);
      ASSERT_TRUE(ids.ok()) << ids.status();
      EXPECT_EQ(*ids, IdsFromDigits(expected[i])) << "text " << i << ": " << nlohmann::json(texts[i]);
      differing += *ids != IdsFromDigits(expected[i]);
    }
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_P(ReferenceTest, EncodesEqually) {
  const std::vector<std::string> texts = ReadTexts();
  ASSERT_GE(texts.size(), 10'000u);
  ExpectEqualIds(GetParam() == std::string("llama3") ? texts : EveryNth(texts, kFixtureStep), ".ids", {});
}

TEST_P(ReferenceTest, EncodesEquallyWithoutSpecialTokens) {
  ExpectEqualIds(EveryNth(ReadTexts(), kFixtureStep), ".plain.ids",
                 {.add_special_tokens = false, .parse_special_tokens = false});
}

TEST_P(ReferenceTest, DecodesEqually) {
  const std::vector<std::string> lines = ReadLines(std::string("tests/text/data/") + GetParam() + ".decode.jsonl");
  ASSERT_GE(lines.size(), 200u);
  for (const std::string& line : lines) {
    const nlohmann::json expected = nlohmann::json::parse(line);
    const std::vector<uint32_t> ids = IdsFromDigits(expected[0].get<std::string>());
    for (const bool skip : {true, false}) {
      const std::string text = expected[skip ? 1 : 2].get<std::string>();
      const auto decoded = tokenizer_->Decode(ids, skip);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_EQ(*decoded, text) << line;

      Detokenizer detokenizer(tokenizer_.get(), {.skip_special_tokens = skip});
      std::string streamed;
      for (const uint32_t id : ids) streamed += detokenizer.Append(id);
      streamed += detokenizer.Finish();
      EXPECT_EQ(streamed, text) << line;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, ReferenceTest,
                         testing::Values("llama3", "gpt2", "gpt2_prefix", "ignore_merges", "stages", "qwen2"),
                         [](const auto& parameter) { return std::string(parameter.param); });

}  // namespace
}  // namespace nibble
