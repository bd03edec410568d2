// What a worker counts; docs/operations-worker.md explains each to the operator.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "common/metrics/registry.h"
#include "nibble/v1/worker.pb.h"

namespace nibble {

struct WorkerMetrics {
  explicit WorkerMetrics(MetricRegistry* registry, const std::string& backend = "", const std::string& model = "");

  Counter& steps;
  Counter& prefill_rows;
  Counter& decode_rows;
  Counter& sampled_tokens;
  Counter& plan_bytes;
  Histogram& step_seconds;
  Histogram& forward_seconds;
  Histogram& collective_seconds;
  Histogram& sample_seconds;
  Histogram& step_rows;
  Gauge& sequences;
  Gauge& pages;
  Gauge& page_bytes;
  Gauge& load_seconds;
  Gauge& epoch;
  Gauge& draining;
  Counter& groups;

  // wall_seconds: from taking the plan to having the result.
  void CountStep(const v1::StepPlan& plan, const v1::StepResult& result, double wall_seconds);
  void CountFailedStep(absl::StatusCode code);

 private:
  MetricRegistry* const registry_;
};

}  // namespace nibble
