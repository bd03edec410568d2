#include "tools/bench/serve_report.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nibble {
namespace {

constexpr size_t kWidth = 50;

std::string Rule(const std::string& title, char fill) {
  const size_t left = (kWidth - title.size()) / 2;
  return std::string(left, fill) + title + std::string(kWidth - title.size() - left, fill) + "\n";
}

std::string Count(const char* label, int64_t value) { return absl::StrFormat("%-40s %-10d\n", label, value); }
std::string Number(const std::string& label, double value) { return absl::StrFormat("%-40s %-10.2f\n", label, value); }

// 99 → "99", 99.9 → "99.9"
std::string PercentName(double percent) { return absl::StrCat(percent); }

std::string Section(const char* title, const char* name, const Summary& summary, const std::vector<double>& percents) {
  std::string out = Rule(title, '-');
  out += Number(absl::StrCat("Mean ", name, " (ms):"), summary.mean);
  out += Number(absl::StrCat("Median ", name, " (ms):"), summary.median);
  for (size_t i = 0; i < percents.size(); ++i) {
    out += Number(absl::StrCat("P", PercentName(percents[i]), " ", name, " (ms):"), summary.percentiles[i]);
  }
  return out;
}

void AddSummary(const char* name, const Summary& summary, const std::vector<double>& percents, nlohmann::json* json) {
  (*json)[absl::StrCat("mean_", name, "_ms")] = summary.mean;
  (*json)[absl::StrCat("median_", name, "_ms")] = summary.median;
  (*json)[absl::StrCat("std_", name, "_ms")] = summary.std;
  for (size_t i = 0; i < percents.size(); ++i) {
    (*json)[absl::StrCat("p", PercentName(percents[i]), "_", name, "_ms")] = summary.percentiles[i];
  }
}

void AddRecords(const LoadResult& result, nlohmann::json* json) {
  nlohmann::json inputs = nlohmann::json::array(), outputs = inputs, ttfts = inputs, itls = inputs, errors = inputs;
  for (const RequestRecord& record : result.records) {
    if (!record.sent) continue;
    nlohmann::json gaps = nlohmann::json::array();
    for (size_t i = 1; i < record.chunks.size(); ++i) {
      gaps.push_back(record.chunks[i].offset_s - record.chunks[i - 1].offset_s);
    }
    inputs.push_back(record.input_tokens);
    outputs.push_back(record.output_tokens);
    ttfts.push_back(record.chunks.empty() ? 0.0f : record.chunks.front().offset_s);
    itls.push_back(std::move(gaps));
    errors.push_back(record.error);
  }
  (*json)["input_lens"] = std::move(inputs);
  (*json)["output_lens"] = std::move(outputs);
  (*json)["ttfts"] = std::move(ttfts);
  (*json)["itls"] = std::move(itls);
  (*json)["errors"] = std::move(errors);
}

nlohmann::json OrNull(const std::optional<double>& value) { return value ? nlohmann::json(*value) : nlohmann::json(); }

}  // namespace

std::string FormatServeReport(const ServeRun& run, const ServeMetrics& metrics) {
  std::string out = Rule(" Serving Benchmark Result ", '=');
  out += Count("Successful requests:", metrics.completed);
  out += Count("Failed requests:", metrics.failed);
  if (metrics.not_sent > 0) out += Count("Requests not sent (interrupted):", metrics.not_sent);
  if (run.max_concurrency > 0) out += Count("Maximum request concurrency:", run.max_concurrency);
  if (std::isfinite(run.workload.request_rate))
    out += Number("Request rate configured (RPS):", run.workload.request_rate);
  out += Number("Benchmark duration (s):", metrics.duration_s);
  out += Count("Total input tokens:", metrics.total_input_tokens);
  out += Count("Total generated tokens:", metrics.total_output_tokens);
  out += Number("Request throughput (req/s):", metrics.request_throughput);
  if (run.goodput.any()) out += Number("Request goodput (req/s):", metrics.request_goodput);
  out += Number("Output token throughput (tok/s):", metrics.output_throughput);
  out += Number("Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s);
  out += Number("Peak concurrent requests:", static_cast<double>(metrics.max_concurrent_requests));
  out += Number("Total token throughput (tok/s):", metrics.total_token_throughput);
  out += Section("Time to First Token", "TTFT", metrics.ttft_ms, metrics.percents);
  out += Section("Time per Output Token (excl. 1st token)", "TPOT", metrics.tpot_ms, metrics.percents);
  out += Section("Inter-token Latency", "ITL", metrics.itl_ms, metrics.percents);
  out += Section("End-to-end Latency", "E2EL", metrics.e2el_ms, metrics.percents);
  if (!metrics.errors.empty()) out += Rule("Errors", '-');
  for (const auto& [code, error] : metrics.errors) {
    out += absl::StrFormat("%-40s %-10d\n  for example: %s\n", code + ":", error.count, error.example);
  }
  out += std::string(kWidth, '=') + "\n";
  return out;
}

nlohmann::json ServeReportJson(const ServeRun& run, const ServeMetrics& metrics, const LoadResult& result,
                               bool detailed) {
  const WorkloadOptions& workload = run.workload;
  nlohmann::json json = {
      {"date", run.date},
      {"backend", "nibble"},
      {"model_id", run.model.model_name()},
      {"quantization", run.model.quantization()},
      {"server_version", run.server_version},
      {"num_prompts", workload.num_requests},
      {"burstiness", workload.burstiness},
      {"seed", workload.seed},
      {"duration", metrics.duration_s},
      {"completed", metrics.completed},
      {"failed", metrics.failed},
      {"not_sent", metrics.not_sent},
      {"total_input_tokens", metrics.total_input_tokens},
      {"total_output_tokens", metrics.total_output_tokens},
      {"total_cached_tokens", metrics.total_cached_tokens},
      {"total_preemptions", metrics.total_preemptions},
      {"request_throughput", metrics.request_throughput},
      {"output_throughput", metrics.output_throughput},
      {"total_token_throughput", metrics.total_token_throughput},
      {"max_output_tokens_per_s", metrics.max_output_tokens_per_s},
      {"max_concurrent_requests", metrics.max_concurrent_requests},
  };
  // vLLM writes the string "inf" and null here; JSON has no infinity.
  json["request_rate"] =
      std::isfinite(workload.request_rate) ? nlohmann::json(workload.request_rate) : nlohmann::json("inf");
  json["max_concurrency"] = run.max_concurrency > 0 ? nlohmann::json(run.max_concurrency) : nlohmann::json();
  json["request_goodput"] = run.goodput.any() ? nlohmann::json(metrics.request_goodput) : nlohmann::json();
  json["goodput_limits_ms"] = {{"ttft", OrNull(run.goodput.ttft_ms)},
                               {"tpot", OrNull(run.goodput.tpot_ms)},
                               {"e2el", OrNull(run.goodput.e2el_ms)}};
  if (workload.dataset_file.empty()) {
    json["input_len"] = workload.input_len;
    json["output_len"] = workload.output_len;
    json["prefix_len"] = workload.prefix_len;
  } else {
    json["dataset"] = workload.dataset_file;
  }
  AddSummary("ttft", metrics.ttft_ms, metrics.percents, &json);
  AddSummary("tpot", metrics.tpot_ms, metrics.percents, &json);
  AddSummary("itl", metrics.itl_ms, metrics.percents, &json);
  AddSummary("e2el", metrics.e2el_ms, metrics.percents, &json);
  json["error_counts"] = nlohmann::json::object();
  for (const auto& [code, error] : metrics.errors) {
    json["error_counts"][code] = {{"count", error.count}, {"example", error.example}};
  }
  if (detailed) AddRecords(result, &json);
  return json;
}

}  // namespace nibble
