#include "common/text/nfc.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "common/text/utf8.h"

namespace nibble {
namespace {

TEST(NfcTest, ComposesAndOrders) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"e\u0301", "é"},
      {"a\u0323\u0307", "ạ\u0307"},  // the first mark composes, the second finds no composite
      {"a\u0307\u0323", "ạ\u0307"},  // canonical order: below before above
      {"s\u0307\u0323", "ṩ"},        // and composes through both
      {"\u212B", "Å"},               // singleton
      {"\u0958", "\u0915\u093C"},    // composition exclusion
      {"\u0344", "\u0308\u0301"},    // a mark that decomposes to two
      {"\u1112\u1161\u11AB", "한"},  // Hangul
      {"\uD558\u11AB", "한"},
      {"\u1112\u1161\u11A7", "하\u11A7"},  // not a trailing consonant
      {"\uAC01\u11A8", "\uAC01\u11A8"},    // a full syllable takes no more
      {"\u0301e", "\u0301e"},
      {"e\u0334\u0301", "é\u0334"},  // a mark of a lower class does not block
      {"e\u0301\u0301", "é\u0301"},  // one of the same class does
      {"\u1100\u0301\u1161", "\u1100\u0301\u1161"},
      {"\U0001D15E", "\U0001D157\U0001D165"},
      {"\U0002FA1D", "\U0002A600"},
      {"", ""},
      {"plain", "plain"},
  };
  for (const auto& [text, expected] : cases) {
    EXPECT_EQ(ToNfc(text), expected) << text;
    EXPECT_EQ(ToNfc(expected), expected) << text;
    if (text != expected) {
      EXPECT_FALSE(IsSurelyNfc(text)) << text;
    }
  }
}

// What the bitmap calls safe must be safe beside every character, in particular beside one that composes.
TEST(NfcTest, SafeCharactersStayAsTheyAre) {
  int safe = 0;
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(c, &text);
    text = "a" + text + text;
    EXPECT_EQ(ToNfc(ToNfc(text)), ToNfc(text)) << std::hex << uint32_t{c};
    if (!IsSurelyNfc(text)) continue;
    ++safe;
    ASSERT_EQ(ToNfc(text), text) << std::hex << uint32_t{c};
  }
  EXPECT_GT(safe, 1'000'000);
}

TEST(NfcTest, LongRunsOfMarksTakeLittleTime) {
  const auto start = std::chrono::steady_clock::now();
  std::string text = "a";
  for (int i = 0; i < 200'000; ++i) text += i % 2 == 0 ? "\u0301" : "\u0323";
  EXPECT_EQ(ToNfc(text).size(), text.size());  // "ạ" (3 bytes) takes the place of "a" (1) and one mark (2)
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace nibble
