// From request records to the numbers of `vllm bench serve` (its benchmarks/serve.py, calculate_metrics). Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/bench/load.h"
#include "tools/bench/statistics.h"

namespace nibble {

// Limits a request must keep to count as good; absent ones do not matter.
struct GoodputLimits {
  std::optional<double> ttft_ms, tpot_ms, e2el_ms;
  bool any() const { return ttft_ms || tpot_ms || e2el_ms; }
};
// "ttft:200", "tpot:30", "e2el:5000", each at most once, milliseconds above 0.
absl::StatusOr<GoodputLimits> ParseGoodput(const std::vector<std::string>& pairs);

struct ErrorCount {
  int64_t count = 0;
  std::string example;
};

// Definitions. TTFT: send → first message with tokens. TPOT, per request with at least two tokens: (latency − TTFT) /
// (tokens − 1). ITL: every gap between two messages with tokens. E2EL: send → last message with tokens. All in
// milliseconds and over successful requests only. Throughputs divide by the duration of the whole run.
struct ServeMetrics {
  double duration_s = 0;
  int64_t completed = 0;
  int64_t failed = 0;    // sent and not completed
  int64_t not_sent = 0;  // only after an interrupt
  int64_t total_input_tokens = 0;
  int64_t total_output_tokens = 0;
  int64_t total_cached_tokens = 0;
  int64_t total_preemptions = 0;
  double request_throughput = 0;  // per second, as the following
  double request_goodput = 0;
  double output_throughput = 0;
  double total_token_throughput = 0;
  double max_output_tokens_per_s = 0;  // of the best whole second of the run
  int64_t max_concurrent_requests = 0;
  std::vector<double> percents;
  Summary ttft_ms, tpot_ms, itl_ms, e2el_ms;
  std::map<std::string, ErrorCount> errors;  // by code name
};
ServeMetrics Measure(const LoadResult& result, const GoodputLimits& goodput, const std::vector<double>& percents);

}  // namespace nibble
