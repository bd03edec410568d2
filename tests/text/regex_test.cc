#include "common/text/regex.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/text/pre_tokenizer.h"

namespace nibble {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<std::string> Matches(std::string_view pattern, std::string_view text) {
  const absl::StatusOr<Regex> regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << regex.status();
  std::vector<std::string> result;
  if (!regex.ok()) return result;
  RegexScan scan(*regex, RegexScan::Deadline(text.size()));
  scan.Start(text);
  size_t begin = 0, end = 0;
  while (scan.Next(&begin, &end)) result.emplace_back(text.substr(begin, end - begin));
  EXPECT_TRUE(scan.status().ok()) << scan.status();
  return result;
}

TEST(RegexTest, MatchesGpt2Words) {
  EXPECT_THAT(Matches(kGpt2Pattern, "I'll  say: naïve\n\n x²!"),
              ElementsAre("I", "'ll", " ", " say", ":", " naïve", "\n\n", " x", "²", "!"));
}

TEST(RegexTest, WhiteSpaceIsTheUnicodeProperty) {
  // U+180E is white space to PCRE2's own \s.
  EXPECT_THAT(Matches("\\s", "a\u180Eb\u200Bc"), IsEmpty());
  EXPECT_THAT(Matches("\\s+", "a\u0085\u00A0\u3000b"), ElementsAre("\u0085\u00A0\u3000"));
  EXPECT_THAT(Matches("[^\\sx]+", "ax\u180E\u2003b"), ElementsAre("a", "\u180E", "b"));
  EXPECT_THAT(Matches("\\S+", "a\u180E \tb"), ElementsAre("a\u180E", "b"));
}

TEST(RegexTest, FollowsRubySyntax) {
  EXPECT_THAT(Matches("^.", "ab\ncd"), ElementsAre("a", "c"));  // ^ and $ at every line
  EXPECT_THAT(Matches(".$", "ab\ncd"), ElementsAre("b", "d"));
  EXPECT_THAT(Matches(".+", "ab\rcd\nef"), ElementsAre("ab\rcd", "ef"));  // lines end with LF only
  EXPECT_THAT(Matches("\\v", "\n\v\u2028"), ElementsAre("\v"));
  EXPECT_THAT(Matches("\\p{Han}+", "a漢字、b"), ElementsAre("漢字"));  // the script, not its extensions
  EXPECT_THAT(Matches("\\p{^L}+", "ab12c"), ElementsAre("12"));
  EXPECT_THAT(Matches("\\u4e00|\\x41|\\x{1F600}", "一A😀B"), ElementsAre("一", "A", "😀"));
  EXPECT_THAT(Matches("(?i:'S)", "'s'S'ſ"), ElementsAre("'s", "'S", "'ſ"));
}

TEST(RegexTest, QuotesEveryByte) {
  std::string ascii;
  for (char c = 1; c < 127; ++c) ascii.push_back(c);
  EXPECT_THAT(Matches(QuotePattern(ascii), "x" + ascii + "y"), ElementsAre(ascii));
  EXPECT_THAT(Matches(QuotePattern("é。"), "aé。b"), ElementsAre("é。"));
}

TEST(RegexTest, RefusesWhatTheEnginesReadDifferently) {
  for (const char* pattern :
       {"\\w+",  "\\bx",       "\\h",           "\\R",         "\\X",    "\\Gx",       "\\Qx\\E",  "\\1",
        "\\pL",  "[a[bc]]",    "[\\p{L}&&[a]]", "[[:alpha:]]", "[^\\S]", "[]a]",       "a{1,3}+",  "a{3}?",
        "a{,3}", "a{",         "b(?i)a|c",      "(?m:.)",      "(?x:a)", "(?<name>a)", "(?P<n>a)", "(?(1)a)",
        "(?~a)", "(?>a)(?#x)", "(*ACCEPT)",     "(*UTF)a",     "\\xff",  "\\p{L&}",    "\\p{Any1}"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kUnimplemented)
        << pattern << Regex::Compile(pattern).status();
  }
}

TEST(RegexTest, RejectsBrokenPatterns) {
  for (const std::string& pattern :
       {std::string(), std::string("(a"), std::string("a)"), std::string("[a"), std::string("*a"),
        std::string("\\p{Klingon}"), std::string("\\x{110000}"), std::string("\xff"), std::string("[b-a]"),
        std::string(100, '('), std::string(Regex::kMaxPatternBytes + 1, 'a'), std::string("(?:a{60000}){60000}")}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kInvalidArgument) << pattern.substr(0, 40);
  }
  EXPECT_THAT(Regex::Compile("(a").status().message(), HasSubstr("(a"));
  for (const char* pattern : {"a*", "a|", "(?=a)", "\\A", "(?:)", "x*y*"})
    EXPECT_THAT(Regex::Compile(pattern).status().message(), HasSubstr("empty string")) << pattern;
}

// Whatever a pattern does, it ends; and it says why.
TEST(RegexTest, BacktrackingHasALimit) {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"(a+)+$", std::string(64, 'a') + "b"},
      {"(?:a|aa)+$", std::string(200, 'a') + "b"},
      {"(?:\\s*a?)*\\d", std::string(20'000, ' ')},
      {"[\\s\\p{L}]*[\\s\\p{N}]*[\\s\\p{P}]*[\\p{N}\\p{P}]", std::string(20'000, ' ')},
      {"\\s*\\s*\\s*\\d", std::string(100'000, ' ')},
      {"\\s*[\\r\\n]+|\\s", std::string(400'000, ' ')},  // quadratic: no single attempt is long
      {"(?:x+x+)+[yz]", std::string(100'000, 'x')},
  };
  for (const auto& [pattern, text] : cases) {
    const absl::StatusOr<Regex> regex = Regex::Compile(pattern);
    ASSERT_TRUE(regex.ok()) << regex.status();
    RegexScan scan(*regex, RegexScan::Deadline(text.size()));
    scan.Start(text);
    size_t begin = 0, end = 0;
    while (scan.Next(&begin, &end)) {
    }
    EXPECT_EQ(scan.status().code(), absl::StatusCode::kResourceExhausted) << pattern;
    EXPECT_FALSE(scan.Next(&begin, &end)) << "an exhausted scan must stay exhausted";
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

// More than the compiled code's stack holds: the interpreter takes over.
TEST(RegexTest, DeepGroupsMatchInTheInterpreter) {
  const std::string text(20'000, 'a');
  EXPECT_THAT(Matches("(?:a|b)+", text), ElementsAre(text));
}

TEST(RegexTest, FindsMatchesBehindLongGaps) {
  for (const size_t gap : {63u, 64u, 65u, 66u, 319u, 320u, 321u, 100'000u}) {
    std::string filler;
    while (filler.size() < gap) filler += "é";
    EXPECT_THAT(Matches("\\p{N}{1,3}", filler + "1234" + filler + "5"), ElementsAre("123", "4", "5")) << gap;
  }
}

TEST(PreTokenizerTest, StagesCutPiecesOfStages) {
  absl::StatusOr<PreTokenizer> pre_tokenizer = PreTokenizer::Create({{.pattern = "\\p{N}"},
                                                                     {.pattern = "-", .keep_matches = false},
                                                                     {.pattern = "[a-z]", .keep_gaps = false},
                                                                     {.prefix_space = true}});
  ASSERT_TRUE(pre_tokenizer.ok()) << pre_tokenizer.status();
  PreTokenizer::Scratch scratch(*pre_tokenizer, 100);
  for (int round = 0; round < 2; ++round) {  // the scratch serves one segment after the other
    std::vector<std::string> words;
    ASSERT_TRUE(
        pre_tokenizer->Split("ab-C1-d", &scratch, [&](std::string_view word) { words.emplace_back(word); }).ok());
    EXPECT_THAT(words, ElementsAre(" a", " b", " d"));
    ASSERT_TRUE(pre_tokenizer->Split("", &scratch, [&](std::string_view) { FAIL(); }).ok());
  }
}

}  // namespace
}  // namespace nibble
