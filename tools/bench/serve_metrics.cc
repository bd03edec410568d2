#include "tools/bench/serve_metrics.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

// Requests in flight at the same instant, at most. A request that ends exactly when another begins makes room first.
int64_t MaxConcurrent(const std::vector<RequestRecord>& records) {
  std::vector<std::pair<double, int>> events;
  for (const RequestRecord& record : records) {
    if (!record.sent) continue;
    events.emplace_back(record.sent_s, +1);
    events.emplace_back(record.sent_s + record.latency_s, -1);
  }
  std::sort(events.begin(), events.end());
  int64_t now = 0, most = 0;
  for (const auto& [time, change] : events) most = std::max(most, now += change);
  return most;
}

// Tokens of the best second, seconds counted from the start of the run as in vLLM.
double MaxOutputTokensPerSecond(const std::vector<RequestRecord>& records) {
  std::map<int64_t, int64_t> seconds;
  for (const RequestRecord& record : records) {
    if (!record.ok()) continue;
    for (const RequestRecord::Chunk& chunk : record.chunks) {
      seconds[static_cast<int64_t>(record.sent_s + chunk.offset_s)] += chunk.tokens;
    }
  }
  int64_t most = 0;
  for (const auto& [second, tokens] : seconds) most = std::max(most, tokens);
  return static_cast<double>(most);
}

}  // namespace

absl::StatusOr<GoodputLimits> ParseGoodput(const std::vector<std::string>& pairs) {
  GoodputLimits limits;
  for (const std::string& pair : pairs) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(pair, absl::MaxSplits(':', 1));
    std::optional<double>* limit = parts.first == "ttft"   ? &limits.ttft_ms
                                   : parts.first == "tpot" ? &limits.tpot_ms
                                   : parts.first == "e2el" ? &limits.e2el_ms
                                                           : nullptr;
    if (limit == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("goodput is '", pair, "', must be ttft:MS, tpot:MS or e2el:MS"));
    }
    double value = 0;
    if (*limit || !absl::SimpleAtod(parts.second, &value) || !(value > 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("goodput is '", pair, "', must give ", parts.first, " once, in milliseconds above 0"));
    }
    *limit = value;
  }
  return limits;
}

ServeMetrics Measure(const LoadResult& result, const GoodputLimits& goodput, const std::vector<double>& percents) {
  ServeMetrics metrics;
  metrics.duration_s = result.duration_s;
  metrics.percents = percents;
  std::vector<double> ttft_ms, tpot_ms, itl_ms, e2el_ms;
  int64_t good = 0;
  for (const RequestRecord& record : result.records) {
    if (!record.sent) {
      ++metrics.not_sent;
      continue;
    }
    if (!record.ok()) {
      ++metrics.failed;
      ErrorCount& error = metrics.errors[CodeName(record.code)];
      if (error.count++ == 0) error.example = record.error;
      continue;
    }
    ++metrics.completed;
    metrics.total_input_tokens += record.input_tokens;
    metrics.total_output_tokens += record.output_tokens;
    metrics.total_cached_tokens += record.cached_tokens;
    metrics.total_preemptions += record.preemptions;

    const double e2el = record.latency_s * 1e3;
    const double ttft = record.chunks.empty() ? e2el : record.chunks.front().offset_s * 1e3;
    // A request with one token has no TPOT; for goodput it counts as 0, as in vLLM.
    const double tpot = record.output_tokens > 1 ? (e2el - ttft) / (record.output_tokens - 1) : 0;
    e2el_ms.push_back(e2el);
    ttft_ms.push_back(ttft);
    if (record.output_tokens > 1) tpot_ms.push_back(tpot);
    for (size_t i = 1; i < record.chunks.size(); ++i) {
      itl_ms.push_back((record.chunks[i].offset_s - record.chunks[i - 1].offset_s) * 1e3);
    }
    good += ttft <= goodput.ttft_ms.value_or(ttft) && tpot <= goodput.tpot_ms.value_or(tpot) &&
            e2el <= goodput.e2el_ms.value_or(e2el);
  }
  metrics.max_output_tokens_per_s = MaxOutputTokensPerSecond(result.records);
  metrics.max_concurrent_requests = MaxConcurrent(result.records);
  if (result.duration_s > 0) {
    metrics.request_throughput = static_cast<double>(metrics.completed) / result.duration_s;
    metrics.request_goodput = static_cast<double>(good) / result.duration_s;
    metrics.output_throughput = static_cast<double>(metrics.total_output_tokens) / result.duration_s;
    metrics.total_token_throughput =
        static_cast<double>(metrics.total_input_tokens + metrics.total_output_tokens) / result.duration_s;
  }
  metrics.ttft_ms = Summarize(std::move(ttft_ms), percents);
  metrics.tpot_ms = Summarize(std::move(tpot_ms), percents);
  metrics.itl_ms = Summarize(std::move(itl_ms), percents);
  metrics.e2el_ms = Summarize(std::move(e2el_ms), percents);
  return metrics;
}

}  // namespace nibble
