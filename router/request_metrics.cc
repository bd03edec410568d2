#include "router/request_metrics.h"

#include <cstddef>

#include "common/metrics/buckets.h"

namespace nibble {
namespace {

double Seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

RequestMetrics::RequestMetrics(MetricRegistry* r, const std::string& model)
    : first_token_(r->AddHistogram({"nibble_time_to_first_token_seconds",
                                    "Seconds from a request's arrival to its first token.", {{"model_name", model}}},
                                   kLatencyBuckets)),
      token_(r->AddHistogram({"nibble_inter_token_latency_seconds", "Seconds between two tokens of a sequence.",
                              {{"model_name", model}}},
                             kTokenBuckets)),
      per_output_token_(r->AddHistogram({"nibble_request_time_per_output_token_seconds",
                                         "Mean seconds between the tokens of a finished sequence.",
                                         {{"model_name", model}}},
                                        kTokenBuckets)),
      end_to_end_(r->AddHistogram({"nibble_e2e_request_latency_seconds",
                                   "Seconds from a request's arrival to the end of a sequence.",
                                   {{"model_name", model}}},
                                  kRequestBuckets)),
      queue_(r->AddHistogram({"nibble_request_queue_time_seconds", "Seconds from arrival to the first step.",
                              {{"model_name", model}}},
                             kLatencyBuckets)),
      prefill_(r->AddHistogram({"nibble_request_prefill_time_seconds", "Seconds from the first step to the first token.",
                                {{"model_name", model}}},
                               kLatencyBuckets)),
      decode_(r->AddHistogram({"nibble_request_decode_time_seconds", "Seconds from the first token to the last.",
                               {{"model_name", model}}},
                              kRequestBuckets)),
      inference_(r->AddHistogram({"nibble_request_inference_time_seconds", "Seconds from the first step to the last token.",
                                  {{"model_name", model}}},
                                 kRequestBuckets)),
      prompt_tokens_(r->AddHistogram({"nibble_request_prompt_tokens", "Prompt tokens of a finished sequence.",
                                      {{"model_name", model}}},
                                     kCountBuckets)),
      generation_tokens_(r->AddHistogram({"nibble_request_generation_tokens", "Output tokens of a finished sequence.",
                                          {{"model_name", model}}},
                                         kCountBuckets)),
      max_tokens_(r->AddHistogram({"nibble_request_params_max_tokens", "max_tokens of a finished sequence.",
                                   {{"model_name", model}}},
                                  kCountBuckets)),
      n_(r->AddHistogram({"nibble_request_params_n", "n of a finished sequence's request.", {{"model_name", model}}},
                         kCountBuckets)),
      output_cpu_(r->AddCounter({"nibble_router_output_cpu_seconds_total", "CPU seconds of the output threads.",
                                 {{"model_name", model}}})),
      tokenizer_cpu_(r->AddCounter({"nibble_router_tokenizer_cpu_seconds_total", "CPU seconds spent on encoding prompts.",
                                    {{"model_name", model}}})),
      streams_(r->AddGauge({"nibble_router_streams", "Generate calls in progress.", {{"model_name", model}}})) {
  for (const auto& [reason, name] : {std::pair{v1::FINISH_REASON_STOP, "stop"}, {v1::FINISH_REASON_LENGTH, "length"}}) {
    success_[reason] = &r->AddCounter({"nibble_request_success_total", "Finished sequences.",
                                       {{"model_name", model}, {"finished_reason", name}}});
  }
  for (size_t code = 0; code < failed_.size(); ++code) {
    failed_[code] = &r->AddCounter(
        {"nibble_request_error_total", "Generate calls that ended with an error, by gRPC status.",
         {{"model_name", model}, {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}}});
  }
}

void RequestMetrics::ObserveFirstToken(Clock::duration since_arrival) { first_token_.Observe(Seconds(since_arrival)); }

void RequestMetrics::ObserveToken(Clock::duration since_last) { token_.Observe(Seconds(since_last)); }

void RequestMetrics::ObserveFinished(const Times& times, const v1::Finish& finish) {
  const v1::Usage& usage = finish.usage();
  end_to_end_.Observe(Seconds(times.finished_at - times.arrived_at));
  if (times.first_token_at != TimePoint{}) {
    decode_.Observe(Seconds(times.finished_at - times.first_token_at));
    if (usage.completion_tokens() > 1) {
      per_output_token_.Observe(Seconds(times.finished_at - times.first_token_at) / (usage.completion_tokens() - 1));
    }
    if (times.first_scheduled_at != TimePoint{}) {
      queue_.Observe(Seconds(times.first_scheduled_at - times.arrived_at));
      prefill_.Observe(Seconds(times.first_token_at - times.first_scheduled_at));
      inference_.Observe(Seconds(times.finished_at - times.first_scheduled_at));
    }
  }
  prompt_tokens_.Observe(usage.prompt_tokens());
  generation_tokens_.Observe(usage.completion_tokens());
  max_tokens_.Observe(times.max_tokens);
  n_.Observe(times.n);
  if (const auto it = success_.find(finish.finish_reason()); it != success_.end()) it->second->Increment();
}

void RequestMetrics::CountFailed(absl::StatusCode code) {
  const size_t index = static_cast<size_t>(code);
  failed_[index < failed_.size() ? index : static_cast<size_t>(absl::StatusCode::kUnknown)]->Increment();
}

}  // namespace nibble
