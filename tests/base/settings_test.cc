// Flags and the YAML file together: what is set, and that every problem of both is told at once.
#include "common/settings/settings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Config {
  std::string text, listen = "127.0.0.1:1", metrics, color = "red", level = "info";
  int number = 7;
  int64_t bytes = int64_t{64} << 20;
  bool on = true;
  std::vector<std::string> many;
};

absl::StatusOr<std::string> Parse(Config* c, const std::vector<std::string>& arguments) {
  const std::vector<Setting> settings = {Setting::Text("text", "TEXT", "any text", &c->text),
                                         Setting::Address("listen", "an address", &c->listen, /*may_be_empty=*/false),
                                         Setting::Address("metrics", "another", &c->metrics, /*may_be_empty=*/true),
                                         Setting::Choice("color", "a colour", {"red", "blue"}, &c->color),
                                         Setting::Number("number", "a number", -5, 50, &c->number),
                                         Setting::Size("memory", "a size", &c->bytes),
                                         Setting::Switch("feature", "a switch", &c->on),
                                         Setting::LogLevel(&c->level),
                                         {"many", "A", "several values", [c](const std::vector<std::string>& values) {
                                            c->many = values;
                                            return std::string();
                                          }}};
  return ParseSettings({.name = "program", .description = "does things"}, settings, arguments,
                       [c](std::vector<std::string>* problems) {
                         if (c->number == 13) problems->push_back("number is 13, which brings bad luck");
                       });
}

std::string Problems(const std::vector<std::string>& arguments) {
  Config config;
  const absl::StatusOr<std::string> result = Parse(&config, arguments);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(result.status().message());
}

std::string WriteTemp(const std::string& text) {
  const std::string path = ::testing::TempDir() + "/settings_test.yaml";
  std::ofstream(path) << text;
  return path;
}

TEST(Settings, Flags) {
  Config c;
  ASSERT_EQ(Parse(&c, {"--text", "x y", "--listen=[::1]:0", "--color", "blue", "--number", "-5", "--memory", "1GiB",
                       "--feature", "off", "--many", "a", "--many", "b", "--log-level", "warn"})
                .value(),
            "");
  EXPECT_EQ(c.text, "x y");
  EXPECT_EQ(c.listen, "[::1]:0");
  EXPECT_EQ(c.metrics, "");
  EXPECT_EQ(c.color, "blue");
  EXPECT_EQ(c.number, -5);
  EXPECT_EQ(c.bytes, int64_t{1} << 30);
  EXPECT_FALSE(c.on);
  EXPECT_EQ(c.level, "warn");
  EXPECT_THAT(c.many, ElementsAre("a", "b"));
}

TEST(Settings, FlagsWinOverTheFile) {
  Config c;
  const std::string file = WriteTemp("number: 3\ncolor: blue\nmetrics: \"\"\nmany:\n  - [a, b]\n  - c\n");
  ASSERT_TRUE(Parse(&c, {"--config", file, "--number", "4"}).ok());
  EXPECT_EQ(c.number, 4);
  EXPECT_EQ(c.color, "blue");
  EXPECT_THAT(c.many, ElementsAre("a,b", "c"));
}

TEST(Settings, EveryProblemAtOnce) {
  const std::string file = WriteTemp("number: many\nfrobnicate: 1\ntext: [a, b]\nfeature: []\n");
  const std::string problems = Problems({"--config", file, "--listen", "nonsense", "--metrics", "x:1:2", "--color",
                                         "green", "--memory", "5q", "--log-level", "loud", "--unknown"});
  for (const char* part :
       {"number is 'many', must be a whole number from -5 to 50", "'frobnicate' is no setting of program",
        "text is given 2 times, must be given once", "feature is given 0 times", "listen is wrong", "metrics is wrong",
        "color is 'green', must be one of red, blue", "memory is '5q', must be a size", "log-level is 'loud'",
        "'--unknown' is no setting of program"}) {
    EXPECT_THAT(problems, HasSubstr(part));
  }
}

TEST(Settings, OneValueWithinItsLimits) {
  EXPECT_THAT(Problems({"--number", "51"}), HasSubstr("number is '51', must be a whole number from -5 to 50"));
  EXPECT_THAT(Problems({"--number", "1", "--number", "2"}), HasSubstr("number is given 2 times, must be given once"));
  EXPECT_THAT(Problems({"--number", "99999999999999999999"}), HasSubstr("number is"));
  EXPECT_THAT(Problems({"--number", "1x"}), HasSubstr("number is '1x'"));
  EXPECT_THAT(Problems({"--number"}), HasSubstr("number"));
  EXPECT_THAT(Problems({"--listen", ""}), HasSubstr("listen is wrong"));
  EXPECT_THAT(Problems({"--feature", "maybe"}), HasSubstr("feature is 'maybe', must be on or off"));
  EXPECT_THAT(Problems({"--number", "13"}), HasSubstr("brings bad luck"));
}

TEST(Settings, BrokenFiles) {
  for (const char* text :
       {"- a\n- b\n", "{", "a: b: c", "? [1]\n: 2", "number: {a: 1}\n", "text: [[[x]]]\n", "[1, 2"}) {
    EXPECT_THAT(Problems({"--config", WriteTemp(text)}), HasSubstr("config")) << text;
  }
  EXPECT_THAT(Problems({"--config", "/nonexistent.yaml"}), HasSubstr("/nonexistent.yaml"));
  EXPECT_THAT(Problems({"--config", "/dev/zero"}), HasSubstr("/dev/zero"));
  const std::string file = WriteTemp("");
  EXPECT_THAT(Problems({"--config", file, "--config", file}), HasSubstr("config is given more than once"));
  Config c;
  EXPECT_TRUE(Parse(&c, {"--config", file}).ok());
}

TEST(Settings, HelpAndVersion) {
  Config c;
  const std::string help = Parse(&c, {"--help", "--number", "wrong"}).value();
  for (const char* part : {"does things", "--number", "a number [7]", "[64MiB]", "on|off", "red|blue", "--config"}) {
    EXPECT_THAT(help, HasSubstr(part));
  }
  EXPECT_THAT(Parse(&c, {"--version"}).value(), HasSubstr("program 0."));
}

TEST(ParseByteSize, UnitsAndLimits) {
  EXPECT_EQ(*ParseByteSize("1"), 1);
  EXPECT_EQ(*ParseByteSize("64MiB"), 64 << 20);
  EXPECT_EQ(*ParseByteSize("1.5GiB"), 1610612736);
  EXPECT_EQ(*ParseByteSize("200MB"), 200000000);
  EXPECT_EQ(*ParseByteSize("1024TiB"), int64_t{1} << 50);
  for (const char* text :
       {"", "0", "-1", "1e3", "GiB", "1 GiB", "1gib", "1..5MiB", "1025TiB", "99999999999999999999999", "nan", "inf"}) {
    EXPECT_FALSE(ParseByteSize(text).ok()) << text;
  }
}

}  // namespace
}  // namespace nibble
