#include "router/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kModel[] = "deploy/models/novelist-17m";

std::string WriteTemp(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + "/router_config_" + name;
  std::ofstream(path) << text;
  return path;
}

std::vector<std::string> Good(std::vector<std::string> more = {}) {
  std::vector<std::string> arguments = {"--model", kModel, "--replica", "127.0.0.1:1,127.0.0.1:2"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST(ConfigTest, FlagsAndDefaults) {
  const auto line = ParseCommandLine(Good({"--replica", "127.0.0.1:3,127.0.0.1:4", "--max-sequences=12", "--run-ahead", "off"}));
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_THAT(line->config.replicas, ElementsAre(ElementsAre("127.0.0.1:1", "127.0.0.1:2"),
                                                 ElementsAre("127.0.0.1:3", "127.0.0.1:4")));
  EXPECT_EQ(line->config.max_sequences, 12u);
  EXPECT_FALSE(line->config.run_ahead);
  EXPECT_TRUE(line->config.prefix_cache);
  EXPECT_EQ(line->config.step_timeout_ms, 5000u);
}

TEST(ConfigTest, FlagsWinOverTheFile) {
  const std::string file = WriteTemp("good.yaml", std::string("model: ") + kModel +
                                                      "\nreplica:\n  - [127.0.0.1:1, 127.0.0.1:2]\n  - 127.0.0.1:3,127.0.0.1:4\n"
                                                      "max-sequences: 33\nprefix-cache: off\nlisten: 127.0.0.1:0\n");
  const auto line = ParseCommandLine({"--config", file, "--max-sequences", "44"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->config.max_sequences, 44u);
  EXPECT_FALSE(line->config.prefix_cache);
  EXPECT_EQ(line->config.listen, "127.0.0.1:0");
  EXPECT_EQ(line->config.replicas.size(), 2u);
}

TEST(ConfigTest, EveryProblemAtOnce) {
  const std::string file = WriteTemp("bad.yaml", "max-step-tokens: many\nno-such-setting: 1\n");
  const auto line = ParseCommandLine({"--config", file, "--model", "/nonexistent", "--listen", "nonsense",
                                      "--max-sequences", "0", "--replica", "", "--frobnicate", "--run-ahead", "maybe"});
  ASSERT_FALSE(line.ok());
  const std::string text(line.status().message());
  for (const char* part : {"max-step-tokens is 'many'", "no-such-setting", "/nonexistent", "listen", "nonsense",
                           "max-sequences is '0', must be a whole number from 1 to", "replica", "--frobnicate",
                           "run-ahead is 'maybe', must be on or off"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST(ConfigTest, NamesWhatIsMissing) {
  const auto line = ParseCommandLine({});
  ASSERT_FALSE(line.ok());
  EXPECT_THAT(std::string(line.status().message()), HasSubstr("model is not set"));
  EXPECT_THAT(std::string(line.status().message()), HasSubstr("replica is not set"));
}

TEST(ConfigTest, RulesBetweenSettings) {
  const auto problem = [](std::vector<std::string> more) {
    const auto line = ParseCommandLine(Good(std::move(more)));
    return line.ok() ? std::string() : std::string(line.status().message());
  };
  EXPECT_THAT(problem({"--replica", "127.0.0.1:3"}), HasSubstr("has 1 workers, must have as many as the first (2)"));
  EXPECT_THAT(problem({"--replica", "127.0.0.1:1,127.0.0.1:9"}), HasSubstr("names 127.0.0.1:1 twice"));
  EXPECT_THAT(problem({"--max-step-tokens", "10"}), HasSubstr("must be at least max-sequences"));
  EXPECT_THAT(problem({"--tls-cert", "x"}), HasSubstr("tls-cert and tls-key must be set together"));
  EXPECT_THAT(problem({"--log-level", "loud"}), HasSubstr("log-level is 'loud'"));
  EXPECT_THAT(problem({"--max-sequences", "3", "--max-sequences", "4"}), HasSubstr("given 2 times"));
  EXPECT_THAT(problem({"--listen", "127.0.0.1:70000"}), HasSubstr("70000"));
  EXPECT_EQ(problem({}), "");
}

TEST(ConfigTest, HelpAndVersion) {
  const auto help = ParseCommandLine({"--help"});
  ASSERT_TRUE(help.ok());
  for (const char* flag : {"--listen", "--replica", "--step-timeout-ms", "--config"}) EXPECT_THAT(help->text, HasSubstr(flag));
  EXPECT_THAT(ParseCommandLine({"--version"})->text, HasSubstr("nibble-router "));
}

}  // namespace
}  // namespace nibble
