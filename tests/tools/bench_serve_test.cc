// `nibble-bench serve` against an in-process service.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/tools/fake_inference.h"
#include "tools/bench/serve.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

struct Result {
  int exit_code = 0;
  std::string out, err;
};

class BenchServeTest : public ::testing::Test {
 protected:
  Result Serve(std::vector<std::string> args) {
    args.insert(args.begin(), {"--server", service_.address()});
    std::reverse(args.begin(), args.end());
    CLI::App app;
    ServeFlags flags;
    AddServeFlags(&app, &flags);
    std::ostringstream out, err;
    Result result;
    try {
      app.parse(args);
      result.exit_code = ServeCommand(flags, out, err, nullptr);
    } catch (const CLI::ParseError& error) {
      result.exit_code = app.exit(error, out, err) == 0 ? kExitOk : kExitUsage;
    }
    result.out = out.str();
    result.err = err.str();
    return result;
  }

  testing::FakeInference service_;
};

TEST_F(BenchServeTest, TwoHundredStreamsAtOnce) {
  const std::string path = ::testing::TempDir() + "/nibble_bench.json";
  const Result result = Serve({"--num-requests", "200", "--input-len", "32", "--output-len", "16", "--request-rate",
                               "inf", "--connections", "3", "--warmup", "2", "--json", path});
  ASSERT_EQ(result.exit_code, kExitOk) << result.err << result.out;
  EXPECT_THAT(result.out, HasSubstr("Successful requests:                     200"));
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file, nullptr, false);
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["completed"], 200);
  EXPECT_EQ(json["failed"], 0);
  EXPECT_EQ(json["total_input_tokens"], 200 * 32);
  EXPECT_EQ(json["total_output_tokens"], 200 * 16);
  EXPECT_GT(json["mean_ttft_ms"].get<double>(), 0);
  EXPECT_GE(json["p99_e2el_ms"].get<double>(), json["p99_ttft_ms"].get<double>());
  EXPECT_GE(json["max_concurrent_requests"].get<int>(), 1);
  EXPECT_EQ(service_.generate_calls(), 202);
  EXPECT_EQ(service_.distinct_prompts(), 202u);
  EXPECT_EQ(service_.connections(), 3u);
  EXPECT_TRUE(service_.last_request().sampling_params().ignore_eos());
}

TEST_F(BenchServeTest, LimitOnConcurrencyHolds) {
  const Result result =
      Serve({"--num-requests", "60", "--input-len", "4", "--output-len", "8", "--max-concurrency", "3", "--json", "-"});
  ASSERT_EQ(result.exit_code, kExitOk) << result.err;
  const auto json = nlohmann::json::parse(result.out, nullptr, false);
  EXPECT_EQ(json["completed"], 60);
  EXPECT_LE(json["max_concurrent_requests"].get<int>(), 3);
  EXPECT_EQ(json["max_concurrency"], 3);
}

TEST_F(BenchServeTest, FailuresAreCountedByCodeAndShown) {
  service_.fail_every = 4;
  const Result result = Serve({"--num-requests", "40", "--input-len", "4", "--output-len", "2", "--warmup", "0"});
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.out, HasSubstr("Successful requests:                     30"));
  EXPECT_THAT(result.out, HasSubstr("Failed requests:                         10"));
  EXPECT_THAT(result.out, HasSubstr("UNAVAILABLE:                             10"));
  EXPECT_THAT(result.out, HasSubstr("for example: UNAVAILABLE: no replica is ready"));
}

TEST_F(BenchServeTest, FailedWarmupEndsTheRun) {
  service_.fail_every = 1;
  const Result result = Serve({"--num-requests", "4"});
  EXPECT_EQ(result.exit_code, kExitTryAgain);
  EXPECT_THAT(result.err, HasSubstr("warm-up request failed: UNAVAILABLE"));
  EXPECT_EQ(service_.generate_calls(), 1);
}

TEST_F(BenchServeTest, DatasetAndStreamWithoutFinish) {
  const std::string path = ::testing::TempDir() + "/nibble_dataset.jsonl";
  std::ofstream(path) << R"({"prompt": "Once", "output_len": 3})"
                         "\n"
                         R"({"prompt": "cut"})"
                         "\n";
  const Result result = Serve({"--num-requests", "4", "--dataset", path, "--warmup", "0", "--detailed", "--json", "-"});
  EXPECT_EQ(result.exit_code, kExitFailure);
  const auto json = nlohmann::json::parse(result.out, nullptr, false);
  EXPECT_EQ(json["completed"], 2);
  EXPECT_EQ(json["failed"], 2);
  EXPECT_EQ(json["total_output_tokens"], 6);
  EXPECT_THAT(json["error_counts"]["INTERNAL"]["example"].get<std::string>(), HasSubstr("without finish"));
}

TEST_F(BenchServeTest, RequestTimeoutCounts) {
  const std::string path = ::testing::TempDir() + "/nibble_hang.jsonl";
  std::ofstream(path) << R"({"prompt": "hang"})"
                         "\n";
  const Result result = Serve({"--num-requests", "3", "--dataset", path, "--warmup", "0", "--request-timeout", "0.2"});
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.out, HasSubstr("DEADLINE_EXCEEDED:                       3"));
}

TEST_F(BenchServeTest, WrongCommandLinesSendNothing) {
  const std::vector<std::vector<std::string>> wrong = {
      {"--request-rate", "0"},   {"--request-rate", "fast"}, {"--num-requests", "0"},  {"--input-len", "0"},
      {"--goodput", "nonsense"}, {"--burstiness", "0"},      {"--percentiles", "101"}, {"--dataset", "/no/such"},
      {"--connections", "0"},    {"--prefix-len", "99999"},  {"--server", "nonsense"}};
  for (const auto& args : wrong) {
    const Result result = Serve(args);
    EXPECT_EQ(result.exit_code, kExitUsage) << ::testing::PrintToString(args) << result.out;
    EXPECT_NE(result.err, "");
  }
  EXPECT_EQ(service_.generate_calls(), 0);
}

TEST_F(BenchServeTest, UnwritableResultFileIsAFailure) {
  const Result result = Serve({"--num-requests", "1", "--json", "/no/such/folder/result.json"});
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("/no/such/folder/result.json"));
}

}  // namespace
}  // namespace nibble
