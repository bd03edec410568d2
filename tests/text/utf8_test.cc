#include "common/text/utf8.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {
namespace {

std::string Lossy(std::string_view bytes) {
  std::string text;
  if (AppendUtf8Lossy(bytes, &text) > 0) text += kReplacementCharacter;
  return text;
}

TEST(Utf8Test, EveryScalarValueRoundTrips) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(c, &text);
    const Utf8Step step = ReadUtf8(text);
    ASSERT_EQ(step.kind, Utf8Step::kCharacter) << std::hex << uint32_t{c};
    ASSERT_EQ(step.code_point, c);
    ASSERT_EQ(step.length, text.size());
    for (size_t cut = 1; cut < text.size(); ++cut) {
      const Utf8Step begun = ReadUtf8(std::string_view(text).substr(0, cut));
      ASSERT_EQ(begun.kind, Utf8Step::kTruncated);
      ASSERT_EQ(begun.length, cut);
    }
  }
}

// Unicode 14, section 3.9, tables 3-8 to 3-11: the examples of maximal subparts.
TEST(Utf8Test, ReplacesMaximalSubparts) {
  const std::string r(kReplacementCharacter);
  EXPECT_EQ(Lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(Lossy("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(Lossy("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(Lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(Lossy("a\xF0\x9F\x98"), "a" + r);
}

TEST(Utf8Test, FindsTheFirstInvalidByteAtEveryOffset) {
  for (size_t offset = 0; offset < 40; ++offset) {
    std::string text(40, 'a');
    EXPECT_EQ(ValidUtf8Prefix(text), text.size());
    text[offset] = '\x80';
    EXPECT_EQ(ValidUtf8Prefix(text), offset);
    text.replace(offset, 1, "\xF0\x9F\x98\x80");
    EXPECT_EQ(ValidUtf8Prefix(text), text.size());
    text.resize(offset + 3);
    EXPECT_EQ(ValidUtf8Prefix(text), offset);
  }
}

TEST(Utf8Test, ExcerptsEndBetweenCharacters) {
  EXPECT_EQ(Excerpt("short", 5), "short");
  EXPECT_EQ(Excerpt("shorter", 5), "short...");
  EXPECT_EQ(Excerpt("abc\xE2\x82\xAC"
                    "d",
                    5),
            "abc...");
  EXPECT_EQ(Excerpt("a\xFF"
                    "b",
                    64),
            "a...");
}

TEST(Utf8Test, KnowsTheWhiteSpaceProperty) {
  int count = 0;
  for (char32_t c = 0; c <= 0x10FFFF; ++c) count += IsWhiteSpace(c);
  EXPECT_EQ(count, 25);  // PropList.txt
  EXPECT_FALSE(IsWhiteSpace(0x180E));
  EXPECT_FALSE(IsWhiteSpace(0x200B));
}

}  // namespace
}  // namespace nibble
