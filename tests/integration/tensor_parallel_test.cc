// One model over 1 and 2 ranks, through real processes.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/integration/cluster.h"

namespace nibble::testing {
namespace {

std::vector<v1::GenerateRequest> ScoringRequests(Cluster& cluster) {
  auto requests = VariedRequests(cluster, 24, 400, 1, 7);
  for (auto& request : requests) {
    request.clear_sampling_params();
    request.mutable_sampling_params()->set_max_tokens(1);
    request.mutable_sampling_params()->set_temperature(0);
    request.mutable_sampling_params()->set_prompt_logprobs(0);
    request.mutable_sampling_params()->set_logprobs(0);
  }
  return requests;
}

struct Difference {
  double largest = 0, mean = 0;
};

Difference Compare(const std::string& mode) {
  Cluster one({.model = TestModel(mode), .tensor_parallel = 1});
  Cluster two({.model = TestModel(mode), .tensor_parallel = 2});
  const auto requests = ScoringRequests(one);
  const auto a = GenerateAll(one, requests, 4);
  const auto b = GenerateAll(two, requests, 4);
  Difference difference;
  size_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(a[i].status.ok()) << a[i].status.error_message();
    EXPECT_TRUE(b[i].status.ok()) << b[i].status.error_message();
    EXPECT_EQ(static_cast<int>(a[i].prompt_logprobs.size()), requests[i].tokenized().input_ids_size());
    EXPECT_EQ(a[i].prompt_logprobs.size(), b[i].prompt_logprobs.size());
    for (size_t k = 1; k < std::min(a[i].prompt_logprobs.size(), b[i].prompt_logprobs.size()); ++k) {
      const double d = std::abs(a[i].prompt_logprobs[k].logprob() - b[i].prompt_logprobs[k].logprob());
      EXPECT_TRUE(std::isfinite(d));
      difference.largest = std::max(difference.largest, d);
      difference.mean += d;
      ++count;
    }
  }
  difference.mean /= static_cast<double>(std::max<size_t>(count, 1));
  EXPECT_GT(count, 1000u);
  std::printf("%s: TP 1 against TP 2 over %zu log-probabilities: mean |d| %.6f, largest %.6f\n", mode.c_str(), count,
              difference.mean, difference.largest);
  return difference;
}

// Float: only the order of the row-parallel sums differs.
TEST(TensorParallel, FloatLogprobsAgree) {
  const Difference d = Compare("bf16");
  EXPECT_LT(d.largest, 2e-3);
}

// Quantized: the row-parallel inputs are scaled per shard (numerics.md), so codes differ by rounding there.
TEST(TensorParallel, QuantizedLogprobsAgree) {
  const Difference d = Compare("w4a8kv4");
  EXPECT_LT(d.mean, 0.06);
  EXPECT_LT(d.largest, 2.0);
}

}  // namespace
}  // namespace nibble::testing
