// The result of `nibble-bench serve` for people (the layout of `vllm bench serve`) and for programs (its keys).
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "nibble/v1/inference.pb.h"
#include "tools/bench/serve_metrics.h"

namespace nibble {

struct ServeRun {
  WorkloadOptions workload;
  int64_t max_concurrency = 0;  // 0 = no limit
  GoodputLimits goodput;
  std::string date;  // UTC, "20261122-201500"
  v1::GetModelInfoResponse model;
  std::string server_version;
};

std::string FormatServeReport(const ServeRun& run, const ServeMetrics& metrics);

// detailed: the records' input_lens, output_lens, ttfts, itls (seconds, as in vLLM) and errors too.
nlohmann::json ServeReportJson(const ServeRun& run, const ServeMetrics& metrics, const LoadResult& result,
                               bool detailed);

}  // namespace nibble
