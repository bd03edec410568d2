#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "tools/bench/serve_metrics.h"
#include "tools/bench/serve_report.h"
#include "tools/bench/statistics.h"
#include "tools/bench/workload.h"

namespace nibble {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

v1::GetModelInfoResponse Model(uint32_t vocab_size) {
  v1::GetModelInfoResponse model;
  model.set_model_name("m");
  model.set_vocab_size(vocab_size);
  model.set_bos_token_id(0);
  model.add_eos_token_ids(2);
  return model;
}

// numpy.percentile([15, 20, 35, 40, 50], p) for p in (0, 25, 40, 50, 99, 100)
TEST(PercentileTest, InterpolatesAsNumpy) {
  const std::vector<double> values = {15, 20, 35, 40, 50};
  EXPECT_DOUBLE_EQ(Percentile(values, 0), 15);
  EXPECT_DOUBLE_EQ(Percentile(values, 25), 20);
  EXPECT_DOUBLE_EQ(Percentile(values, 40), 29);
  EXPECT_DOUBLE_EQ(Percentile(values, 50), 35);
  EXPECT_DOUBLE_EQ(Percentile(values, 99), 49.6);
  EXPECT_DOUBLE_EQ(Percentile(values, 100), 50);
  EXPECT_DOUBLE_EQ(Percentile({7}, 99), 7);
  EXPECT_DOUBLE_EQ(Percentile({}, 99), 0);
}

TEST(SummarizeTest, MeanMedianStdAndPercentiles) {
  const Summary summary = Summarize({4, 1, 3, 2}, {50, 90});
  EXPECT_DOUBLE_EQ(summary.mean, 2.5);
  EXPECT_DOUBLE_EQ(summary.median, 2.5);
  EXPECT_DOUBLE_EQ(summary.std, std::sqrt(1.25));  // numpy.std: of the population
  EXPECT_THAT(summary.percentiles, ElementsAre(2.5, DoubleNear(3.7, 1e-12)));
  EXPECT_THAT(Summarize({}, {99}).percentiles, ElementsAre(0));
}

RequestRecord Success(double sent_s, std::vector<RequestRecord::Chunk> chunks, uint32_t input_tokens) {
  RequestRecord record{.sent = true, .sent_s = sent_s, .input_tokens = input_tokens};
  for (const RequestRecord::Chunk& chunk : chunks) record.output_tokens += chunk.tokens;
  record.latency_s = chunks.back().offset_s;
  record.chunks = std::move(chunks);
  return record;
}

// Two requests that succeed, one that fails; all expected values by hand.
LoadResult ThreeRequests() {
  LoadResult result;
  result.duration_s = 4;
  result.records.push_back(Success(0.0, {{0.5f, 1}, {0.75f, 1}, {1.25f, 2}}, 10));  // TTFT 500, TPOT 250, E2EL 1250
  result.records.push_back(Success(1.0, {{0.25f, 1}}, 20));                         // one token: no TPOT
  RequestRecord failed{
      .sent = true, .code = grpc::StatusCode::UNAVAILABLE, .error = "UNAVAILABLE: gone", .sent_s = 1.5};
  failed.latency_s = 0.5;
  result.records.push_back(failed);
  return result;
}

TEST(MeasureTest, DefinitionsOfTheFourLatencies) {
  const ServeMetrics m = Measure(ThreeRequests(), {}, {99});
  EXPECT_EQ(m.completed, 2);
  EXPECT_EQ(m.failed, 1);
  EXPECT_EQ(m.total_input_tokens, 30);
  EXPECT_EQ(m.total_output_tokens, 5);
  EXPECT_DOUBLE_EQ(m.request_throughput, 0.5);
  EXPECT_DOUBLE_EQ(m.output_throughput, 1.25);
  EXPECT_DOUBLE_EQ(m.total_token_throughput, 8.75);
  EXPECT_NEAR(m.ttft_ms.mean, 375, 1e-3);
  EXPECT_NEAR(m.tpot_ms.mean, 250, 1e-3);
  EXPECT_NEAR(m.itl_ms.mean, 375, 1e-3);  // gaps 250 and 500
  EXPECT_NEAR(m.e2el_ms.mean, 750, 1e-3);
  EXPECT_NEAR(m.e2el_ms.percentiles[0], 1240, 1e-3);
}

TEST(MeasureTest, PeaksAndErrors) {
  const ServeMetrics m = Measure(ThreeRequests(), {}, {99});
  EXPECT_EQ(m.max_concurrent_requests, 2);         // the first two overlap from 1.0 to 1.25 s
  EXPECT_DOUBLE_EQ(m.max_output_tokens_per_s, 3);  // second 1: two of the first request, one of the second
  ASSERT_EQ(m.errors.size(), 1u);
  EXPECT_EQ(m.errors.at("UNAVAILABLE").count, 1);
  EXPECT_EQ(m.errors.at("UNAVAILABLE").example, "UNAVAILABLE: gone");
}

TEST(MeasureTest, GoodputCountsRequestsWithinEveryLimit) {
  const LoadResult result = ThreeRequests();
  EXPECT_DOUBLE_EQ(Measure(result, *ParseGoodput({"ttft:600"}), {99}).request_goodput, 0.5);
  EXPECT_DOUBLE_EQ(Measure(result, *ParseGoodput({"ttft:300"}), {99}).request_goodput, 0.25);
  EXPECT_DOUBLE_EQ(Measure(result, *ParseGoodput({"tpot:200"}), {99}).request_goodput, 0.25);
  EXPECT_DOUBLE_EQ(Measure(result, *ParseGoodput({"ttft:600", "e2el:100"}), {99}).request_goodput, 0);
}

TEST(MeasureTest, InterruptedRunCountsWhatWasNotSent) {
  LoadResult result;
  result.records.resize(3);
  result.records[0] = Success(0, {{0.1f, 1}}, 1);
  const ServeMetrics m = Measure(result, {}, {99});
  EXPECT_EQ(m.completed, 1);
  EXPECT_EQ(m.not_sent, 2);
  EXPECT_EQ(m.failed, 0);
}

TEST(ParseGoodputTest, RefusesWhatItDoesNotKnow) {
  for (const char* pair : {"itl:3", "ttft", "ttft:", "ttft:-1", "ttft:nan", ""}) {
    EXPECT_FALSE(ParseGoodput({pair}).ok()) << pair;
  }
  EXPECT_FALSE(ParseGoodput({"ttft:1", "ttft:2"}).ok());
}

TEST(ReportTest, HasTheLinesOfVllm) {
  ServeRun run;
  run.workload.request_rate = 2;
  run.goodput.ttft_ms = 600;
  const std::string report = FormatServeReport(run, Measure(ThreeRequests(), run.goodput, {99}));
  for (const char* line :
       {"============ Serving Benchmark Result ============",  "Successful requests:                     2         ",
        "Failed requests:                         1         ", "Request rate configured (RPS):           2.00      ",
        "Benchmark duration (s):                  4.00      ", "Total input tokens:                      30        ",
        "Total generated tokens:                  5         ", "Request throughput (req/s):              0.50      ",
        "Request goodput (req/s):                 0.50      ", "Output token throughput (tok/s):         1.25      ",
        "Peak output token throughput (tok/s):    3.00      ", "Peak concurrent requests:                2.00      ",
        "Total token throughput (tok/s):          8.75      ", "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          375.00    ", "-----Time per Output Token (excl. 1st token)------",
        "Median TPOT (ms):                        250.00    ", "---------------Inter-token Latency----------------",
        "----------------End-to-end Latency----------------",  "P99 E2EL (ms):                           1240.00   ",
        "UNAVAILABLE:                             1         ", "for example: UNAVAILABLE: gone"}) {
    EXPECT_THAT(report, HasSubstr(line));
  }
}

TEST(ReportTest, JsonHasTheKeysOfVllm) {
  ServeRun run;
  run.workload.request_rate = kInfinity;
  const LoadResult result = ThreeRequests();
  const nlohmann::json json = ServeReportJson(run, Measure(result, {}, {50, 99.9}), result, /*detailed=*/true);
  for (const char* key : {"date",
                          "backend",
                          "model_id",
                          "num_prompts",
                          "request_rate",
                          "burstiness",
                          "max_concurrency",
                          "duration",
                          "completed",
                          "failed",
                          "total_input_tokens",
                          "total_output_tokens",
                          "request_throughput",
                          "request_goodput",
                          "output_throughput",
                          "total_token_throughput",
                          "max_output_tokens_per_s",
                          "max_concurrent_requests",
                          "mean_ttft_ms",
                          "median_ttft_ms",
                          "std_ttft_ms",
                          "p50_ttft_ms",
                          "p99.9_ttft_ms",
                          "mean_tpot_ms",
                          "mean_itl_ms",
                          "mean_e2el_ms",
                          "input_lens",
                          "output_lens",
                          "ttfts",
                          "itls",
                          "errors"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["request_rate"], "inf");
  EXPECT_EQ(json["itls"][0].size(), 2u);
  EXPECT_EQ(json["errors"][2], "UNAVAILABLE: gone");
}

TEST(ArrivalTimesTest, InfiniteRateSendsEverythingAtOnce) {
  EXPECT_THAT(ArrivalTimes(3, kInfinity, 1, 7), ElementsAre(0, 0, 0));
}

TEST(ArrivalTimesTest, AscendingEndsAtTheOfferedLoadAndRepeats) {
  const std::vector<double> times = ArrivalTimes(2000, 50, 1, 7);
  EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
  EXPECT_NEAR(times.back(), 40, 1e-9);
  EXPECT_EQ(times, ArrivalTimes(2000, 50, 1, 7));
  EXPECT_NE(times, ArrivalTimes(2000, 50, 1, 8));
}

// The coefficient of variation of gamma gaps is 1/√shape: 1 for Poisson.
TEST(ArrivalTimesTest, BurstinessShapesTheGaps) {
  for (const double burstiness : {0.25, 1.0, 4.0}) {
    const std::vector<double> times = ArrivalTimes(20000, 10, burstiness, 3);
    std::vector<double> gaps = {times[0]};
    for (size_t i = 1; i < times.size(); ++i) gaps.push_back(times[i] - times[i - 1]);
    const Summary summary = Summarize(gaps, {});
    EXPECT_NEAR(summary.std / summary.mean, 1 / std::sqrt(burstiness), 0.1 / std::sqrt(burstiness)) << burstiness;
  }
}

TEST(WorkloadTest, RandomPromptsAreRepeatableDistinctAndOrdinaryTokens) {
  const auto workload =
      Workload::Make({.num_requests = 50, .input_len = 64, .request_rate = kInfinity, .seed = 5}, Model(16));
  ASSERT_TRUE(workload.ok()) << workload.status();
  std::set<std::string> prompts;
  std::set<uint32_t> seen;
  for (int64_t i = 0; i < 50; ++i) {
    const v1::GenerateRequest request = workload->Request(i);
    ASSERT_EQ(request.tokenized().input_ids_size(), 64);
    for (const uint32_t id : request.tokenized().input_ids()) seen.insert(id);
    prompts.insert(request.tokenized().SerializeAsString());
    EXPECT_EQ(request.SerializeAsString(), workload->Request(i).SerializeAsString());
  }
  EXPECT_EQ(prompts.size(), 50u);
  EXPECT_EQ(seen, (std::set<uint32_t>{1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}));  // all but BOS 0 and EOS 2
}

TEST(WorkloadTest, PrefixIsShared) {
  const auto workload =
      Workload::Make({.num_requests = 2, .input_len = 32, .prefix_len = 16, .request_rate = kInfinity}, Model(1000));
  ASSERT_TRUE(workload.ok());
  const auto a = workload->Request(0).tokenized().input_ids(), b = workload->Request(1).tokenized().input_ids();
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 16, b.begin()));
  EXPECT_FALSE(std::equal(a.begin() + 16, a.end(), b.begin() + 16));
  EXPECT_FALSE(Workload::Make({.input_len = 4, .prefix_len = 5}, Model(10)).ok());
}

TEST(ParseDatasetTest, ThreeFormsAndDefaults) {
  const auto entries = ParseDataset(
      "{\"input_len\": 5, \"output_len\": 6}\n\n{\"prompt\": \"Hi\", \"max_tokens\": 7}\n{\"token_ids\": [1, 2]}", 9);
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ((*entries)[0].input_len, 5);
  EXPECT_EQ((*entries)[0].output_len, 6);
  EXPECT_EQ((*entries)[1].prompt, "Hi");
  EXPECT_EQ((*entries)[1].output_len, 7);
  EXPECT_THAT((*entries)[2].token_ids, ElementsAre(1, 2));
  EXPECT_EQ((*entries)[2].output_len, 9);
}

TEST(ParseDatasetTest, RefusesWithLineAndReason) {
  for (const char* text : {"", "\n", "nonsense", "[1]", "{}", "{\"input_len\": 0}", "{\"input_len\": 1.5}",
                           "{\"input_len\": 1e300}", "{\"prompt\": 3}", "{\"token_ids\": [-1]}", "{\"token_ids\": 7}",
                           "{\"prompt\": \"a\", \"input_len\": 3}", "{\"prompt\": \"a\", \"output_len\": \"x\"}"}) {
    EXPECT_FALSE(ParseDataset(text, 1).ok()) << text;
  }
  EXPECT_THAT(std::string(ParseDataset("{\"prompt\": \"a\"}\n{\"prompt\": 3}", 1).status().message()),
              HasSubstr("line 2"));
}

}  // namespace
}  // namespace nibble
