#include "common/text/added_tokens.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<std::string> Split(const std::vector<AddedToken>& tokens, std::string_view text,
                               bool parse_special = true) {
  std::vector<std::string> result;
  const AddedTokenMatcher matcher(tokens);
  EXPECT_TRUE(matcher
                  .Split(
                      text, parse_special,
                      [&](std::string_view segment) {
                        EXPECT_FALSE(segment.empty());
                        result.emplace_back(segment);
                        return absl::OkStatus();
                      },
                      [&](uint32_t id) { result.push_back(fmt::format("#{}", id)); })
                  .ok());
  return result;
}

TEST(AddedTokensTest, TakesTheLongestOfTheLeftmost) {
  const std::vector<AddedToken> tokens = {
      {.id = 1, .content = "<a"}, {.id = 2, .content = "<ab>"}, {.id = 3, .content = "b>c"}};
  EXPECT_THAT(Split(tokens, "x<ab>c<ab<a<"), ElementsAre("x", "#2", "c", "#1", "b", "#1", "<"));
  EXPECT_THAT(Split(tokens, "b>b>c"), ElementsAre("b>", "#3"));
  EXPECT_THAT(Split(tokens, ""), IsEmpty());
  EXPECT_THAT(Split({}, "text"), ElementsAre("text"));
}

TEST(AddedTokensTest, LeavesSpecialTokensInTextWhenAsked) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "<s>", .special = true}, {.id = 2, .content = "s"}};
  EXPECT_THAT(Split(tokens, "a<s>s"), ElementsAre("a", "#1", "#2"));
  // The untaken match hides the token inside of it, as in the reference.
  EXPECT_THAT(Split(tokens, "a<s>s", false), ElementsAre("a<s>", "#2"));
}

TEST(AddedTokensTest, StripsWhiteSpace) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "<l>", .lstrip = true},
                                          {.id = 2, .content = "<r>", .rstrip = true},
                                          {.id = 3, .content = "\n"}};
  EXPECT_THAT(Split(tokens, "a \u3000\t<l> b"), ElementsAre("a", "#1", " b"));
  EXPECT_THAT(Split(tokens, "a <r> \u2028b"), ElementsAre("a ", "#2", "b"));
  EXPECT_THAT(Split(tokens, "  <l>"), ElementsAre("#1"));
  EXPECT_THAT(Split(tokens, "<r>  "), ElementsAre("#2"));
  EXPECT_THAT(Split(tokens, "<r>  <l>"), ElementsAre("#2", "#1"));
}

TEST(AddedTokensTest, PassesOnTheFirstError) {
  const AddedTokenMatcher matcher({{.id = 1, .content = "x"}});
  int segments = 0, ids = 0;
  const absl::Status status = matcher.Split(
      "axbxc", true, [&](std::string_view) { return ++segments == 2 ? absl::AbortedError("stop") : absl::OkStatus(); },
      [&](uint32_t) { ++ids; });
  EXPECT_EQ(status.message(), "stop");
  EXPECT_EQ(segments, 2);
  EXPECT_EQ(ids, 1);
}

TEST(AddedTokensTest, WhiteSpaceTokensThatStripTakeLinearTime) {
  const auto start = std::chrono::steady_clock::now();
  const std::string spaces(1'000'000, ' ');
  EXPECT_EQ(Split({{.id = 1, .content = " ", .rstrip = true}}, spaces).size(), spaces.size());
  EXPECT_EQ(Split({{.id = 1, .content = " ", .lstrip = true}}, spaces).size(), spaces.size());
  EXPECT_EQ(Split({{.id = 1, .content = "x", .lstrip = true}}, spaces + "x").size(), 1u);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));  // quadratic: hours
}

}  // namespace
}  // namespace nibble
