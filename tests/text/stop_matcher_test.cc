#include "common/text/stop_matcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace nibble {
namespace {

using testing::HasSubstr;

struct Outcome {
  std::string text;
  std::optional<size_t> matched;
  bool operator==(const Outcome&) const = default;
};

Outcome Feed(StopMatcher matcher, const std::vector<std::string>& pieces) {
  Outcome outcome;
  for (const std::string& piece : pieces) {
    const StopMatcher::Step step = matcher.Append(piece);
    outcome.text += step.text;
    if (step.matched) {
      EXPECT_FALSE(outcome.matched) << "matched twice";
      outcome.matched = step.matched;
    }
  }
  outcome.text += matcher.Flush();
  EXPECT_EQ(matcher.Append("more").text, "");
  return outcome;
}

// The definition: the match that ends first; of those the longest; of equal strings the first.
Outcome Define(const std::vector<std::string>& stops, bool include, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<size_t> best;
    for (size_t i = 0; i < stops.size(); ++i)
      if (!stops[i].empty() && text.substr(0, end).ends_with(stops[i]) &&
          (!best || stops[i].size() > stops[*best].size()))
        best = i;
    if (best) return {text.substr(0, include ? end : end - stops[*best].size()), best};
  }
  return {text, std::nullopt};
}

TEST(StopMatcherTest, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher matcher({"</s>", "aab"});
  EXPECT_EQ(matcher.Append("x<").text, "x");
  EXPECT_EQ(matcher.held_bytes(), 1u);
  EXPECT_EQ(matcher.Append("/").text, "");
  EXPECT_EQ(matcher.Append("b").text, "</b");
  EXPECT_EQ(matcher.Append("aa").text, "");
  EXPECT_EQ(matcher.Append("a").text, "a");  // the last two may still begin "aab"
  const StopMatcher::Step step = matcher.Append("bc");
  EXPECT_EQ(step.text, "");
  EXPECT_EQ(step.matched, 1u);
  EXPECT_EQ(matcher.Append("never seen").text, "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, IncludeHoldsNothingBack) {
  StopMatcher matcher({"END"}, /*include=*/true);
  EXPECT_EQ(matcher.Append("the EN").text, "the EN");
  const StopMatcher::Step step = matcher.Append("D of it");
  EXPECT_EQ(step.text, "D");
  EXPECT_EQ(step.matched, 0u);
}

TEST(StopMatcherTest, WithoutStopsTextPasses) {
  EXPECT_EQ(Feed(StopMatcher(), {"a", "", "b"}), (Outcome{"ab", std::nullopt}));
  EXPECT_EQ(Feed(StopMatcher({"", ""}), {"a", "b"}), (Outcome{"ab", std::nullopt}));
}

TEST(StopMatcherTest, FlushReleasesWhatWasHeld) {
  EXPECT_EQ(Feed(StopMatcher({"abcd"}), {"xab", "c"}), (Outcome{"xabc", std::nullopt}));
}

TEST(StopMatcherTest, EqualsTheDefinitionForEveryCut) {
  std::mt19937 random(3);
  const auto word = [&](size_t max) {
    std::string result;
    for (size_t n = 1 + random() % max; n > 0; --n) result.push_back("ab"[random() % 2]);
    return result;
  };
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::string> stops;
    for (size_t n = 1 + random() % 4; n > 0; --n) stops.push_back(word(6));
    std::string text;
    std::vector<std::string> pieces;
    for (size_t n = random() % 8; n > 0; --n) {
      pieces.push_back(random() % 5 == 0 ? "" : word(5));
      text += pieces.back();
    }
    const bool include = random() % 2 == 0;
    ASSERT_EQ(Feed(StopMatcher(stops, include), pieces), Define(stops, include, text))
        << testing::PrintToString(stops) << " in " << text;
  }
}

TEST(StopMatcherTest, HostileStopsTakeLinearTime) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::string> stops(kMaxStopStrings, std::string(kMaxStopBytes - 1, 'a') + "b");
  StopMatcher matcher(stops);
  const std::string text(1000, 'a');
  size_t bytes = 0;
  for (int i = 0; i < 1000; ++i) bytes += matcher.Append(text).text.size();
  EXPECT_EQ(bytes + matcher.Flush().size(), 1'000'000u);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(StopMatcherTest, AdmissionNamesTheOffendingEntry) {
  EXPECT_TRUE(ValidateStopStrings({}).ok());
  EXPECT_TRUE(ValidateStopStrings(std::vector<std::string>(kMaxStopStrings, std::string(kMaxStopBytes, 'x'))).ok());
  const auto message = [](std::vector<std::string> stops) {
    const absl::Status status = ValidateStopStrings(stops);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message(std::vector<std::string>(kMaxStopStrings + 1, "x")), HasSubstr("65 strings, must be at most 64"));
  EXPECT_THAT(message({"a", ""}), HasSubstr("stop[1] has 0 bytes"));
  EXPECT_THAT(message({std::string(kMaxStopBytes + 1, 'x')}), HasSubstr("stop[0] has 1025 bytes"));
  EXPECT_THAT(message({"ab\xFF"}), HasSubstr("not valid UTF-8 at byte 2"));
}

}  // namespace
}  // namespace nibble
