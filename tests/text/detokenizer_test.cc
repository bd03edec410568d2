#include "common/text/detokenizer.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/text/stop_matcher.h"
#include "common/text/utf8.h"
#include "tests/text/fixtures.h"

namespace nibble {
namespace {

class DetokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    tokenizer_ = LoadFixtureTokenizer("llama3");
    ASSERT_NE(tokenizer_, nullptr);
    for (uint32_t id = 0; id < tokenizer_->vocab_size(); ++id) {
      const std::string_view bytes = tokenizer_->TokenBytes(id);
      if (bytes.size() == 1) byte_ids_[static_cast<uint8_t>(bytes[0])] = id;
    }
  }

  // One token for every byte: the finest possible cut.
  std::vector<uint32_t> ByteTokens(std::string_view bytes) const {
    std::vector<uint32_t> ids;
    for (const char c : bytes) ids.push_back(byte_ids_[static_cast<uint8_t>(c)]);
    return ids;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  uint32_t byte_ids_[256] = {};
};

TEST_F(DetokenizerTest, HoldsBackPartsOfCharacters) {
  Detokenizer detokenizer(tokenizer_.get());
  std::vector<std::string> pieces;
  for (const uint32_t id : ByteTokens("aé€😀")) pieces.emplace_back(detokenizer.Append(id));
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "", "é", "", "", "€", "", "", "", "😀"}));
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST_F(DetokenizerTest, ReplacesBrokenCharactersAsSoonAsTheyAreBroken) {
  Detokenizer detokenizer(tokenizer_.get());
  std::vector<std::string> pieces;
  for (const uint32_t id : ByteTokens("\xE2\x82"
                                      "a\xFF\xF0\x9F\xE2"))
    pieces.emplace_back(detokenizer.Append(id));
  EXPECT_EQ(pieces, (std::vector<std::string>{"", "",
                                              "\uFFFD"
                                              "a",
                                              "\uFFFD", "", "", "\uFFFD"}));
  EXPECT_EQ(detokenizer.Finish(), "\uFFFD");
  EXPECT_EQ(detokenizer.Finish(), "");  // as new
  EXPECT_EQ(detokenizer.Append(byte_ids_['x']), "x");
}

// Every byte string of up to three bytes over the bytes that matter, alone and inside of text: streaming equals
// decoding.
TEST_F(DetokenizerTest, EqualsDecodeForEveryKindOfByte) {
  const std::vector<uint8_t> kinds = {0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
                                      0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
  for (size_t i = 0; i < kinds.size() * kinds.size() * kinds.size(); ++i) {
    const std::string bytes = {static_cast<char>(kinds[i % kinds.size()]),
                               static_cast<char>(kinds[i / kinds.size() % kinds.size()]),
                               static_cast<char>(kinds[i / kinds.size() / kinds.size()])};
    for (const std::string& text : {bytes, bytes + "\x80", bytes + "z"}) {
      const std::vector<uint32_t> ids = ByteTokens(text);
      Detokenizer detokenizer(tokenizer_.get());
      std::string streamed;
      for (const uint32_t id : ids) {
        const std::string_view piece = detokenizer.Append(id);
        ASSERT_EQ(ValidUtf8Prefix(piece), piece.size());  // only whole characters go out
        streamed += piece;
      }
      streamed += detokenizer.Finish();
      ASSERT_EQ(streamed, tokenizer_->Decode(ids).value());
    }
  }
}

TEST_F(DetokenizerTest, SpecialAndUnknownTokensAreNoText) {
  const uint32_t eot = *tokenizer_->TokenToId("<|eot_id|>");
  Detokenizer skipping(tokenizer_.get());
  EXPECT_EQ(skipping.Append(byte_ids_[0xC3]), "");
  EXPECT_EQ(skipping.Append(eot), "");
  EXPECT_EQ(skipping.Append(4096), "");
  EXPECT_EQ(skipping.Append(UINT32_MAX), "");
  EXPECT_EQ(skipping.Append(byte_ids_[0xA9]), "é");  // as the reference joins the bytes around a skipped token
  Detokenizer showing(tokenizer_.get(), {.skip_special_tokens = false});
  EXPECT_EQ(showing.Append(byte_ids_[0xC3]), "");
  EXPECT_EQ(showing.Append(eot), "\uFFFD<|eot_id|>");
}

TEST_F(DetokenizerTest, ComposesWithStopStringsHoweverTheTextIsCut) {
  std::mt19937 random(5);
  const std::string text = "It was — “said he” — 終わり\n\nUser: more";
  for (const std::string stop : {"\n\nUser:", "— 終", "終わり", "“said he”", "not there"}) {
    std::string expected = text.substr(0, text.find(stop));
    for (int round = 0; round < 50; ++round) {
      // A random mixture of byte tokens and the tokenizer's own words.
      std::vector<uint32_t> ids;
      for (size_t at = 0; at < text.size();) {
        size_t length = 1 + random() % 9;
        const size_t valid = ValidUtf8Prefix(std::string_view(text).substr(at, length));
        const auto encoded = valid == 0 ? absl::StatusOr<std::vector<uint32_t>>(ByteTokens(text.substr(at, length)))
                                        : tokenizer_->Encode(text.substr(at, valid), {.add_special_tokens = false});
        ids.insert(ids.end(), encoded->begin(), encoded->end());
        at += valid == 0 ? length : valid;
        if (valid == 0) {  // finish the character that was begun byte by byte
          while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80)
            ids.push_back(byte_ids_[static_cast<uint8_t>(text[at++])]);
        }
      }
      Detokenizer detokenizer(tokenizer_.get());
      StopMatcher stops({stop});
      std::string streamed;
      bool matched = false;
      for (const uint32_t id : ids) {
        const StopMatcher::Step step = stops.Append(detokenizer.Append(id));
        ASSERT_EQ(ValidUtf8Prefix(step.text), step.text.size());
        streamed += step.text;
        if (step.matched) {
          matched = true;
          break;
        }
      }
      if (!matched) streamed += stops.Append(detokenizer.Finish()).text + stops.Flush();
      ASSERT_EQ(streamed, expected) << stop;
      ASSERT_EQ(matched, expected != text);
    }
  }
}

}  // namespace
}  // namespace nibble
