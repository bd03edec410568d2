// What the router counts per request and per token: vLLM's names with our prefix, so that its dashboards translate.
#pragma once

#include <array>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "common/metrics/registry.h"
#include "nibble/v1/inference.pb.h"
#include "router/sequence.h"

namespace nibble {

class RequestMetrics {
 public:
  RequestMetrics(MetricRegistry* registry, const std::string& model_name);

  void ObserveFirstToken(Clock::duration since_arrival);
  void ObserveToken(Clock::duration since_last);

  struct Times {
    TimePoint arrived_at, first_scheduled_at, first_token_at, finished_at;
    uint32_t n = 1;
    uint32_t max_tokens = 0;
  };
  void ObserveFinished(const Times& times, const v1::Finish& finish);
  // A request that ended with an error, cancelled ones and refused ones included.
  void CountFailed(absl::StatusCode code);

  Counter& output_cpu_seconds() { return output_cpu_; }
  Counter& tokenizer_cpu_seconds() { return tokenizer_cpu_; }
  Gauge& streams() { return streams_; }

 private:
  Histogram &first_token_, &token_, &per_output_token_, &end_to_end_, &queue_, &prefill_, &decode_, &inference_,
      &prompt_tokens_, &generation_tokens_, &max_tokens_, &n_;
  std::map<v1::FinishReason, Counter*> success_;
  std::array<Counter*, 17> failed_;  // by status code
  Counter &output_cpu_, &tokenizer_cpu_;
  Gauge& streams_;
};

}  // namespace nibble
