#include "worker/worker_metrics.h"

#include "common/base/version.h"
#include "common/metrics/buckets.h"

namespace nibble {

WorkerMetrics::WorkerMetrics(MetricRegistry* registry, const std::string& backend, const std::string& model)
    : steps(registry->AddCounter({"nibble_worker_steps_total", "Executed steps."})),
      prefill_rows(
          registry->AddCounter({"nibble_worker_rows_total", "Computed token rows, by kind.", {{"kind", "prefill"}}})),
      decode_rows(
          registry->AddCounter({"nibble_worker_rows_total", "Computed token rows, by kind.", {{"kind", "decode"}}})),
      sampled_tokens(
          registry->AddCounter({"nibble_worker_sampled_tokens_total", "Sampled tokens; rank 0 alone reports them."})),
      plan_bytes(
          registry->AddCounter({"nibble_worker_plan_bytes_total", "Serialized size of the executed plans in bytes."})),
      step_seconds(
          registry->AddHistogram({"nibble_worker_step_seconds", "Wall time of one step in seconds."}, kStepBuckets)),
      forward_seconds(registry->AddHistogram(
          {"nibble_worker_forward_seconds", "Forward pass of one step in seconds, collectives and sampling included."},
          kStepBuckets)),
      collective_seconds(
          registry->AddHistogram({"nibble_worker_collective_seconds",
                                  "Time inside collectives of one step in seconds, waiting for other ranks included."},
                                 kStepBuckets)),
      sample_seconds(
          registry->AddHistogram({"nibble_worker_sample_seconds", "Sampling of one step in seconds."}, kStepBuckets)),
      step_rows(registry->AddHistogram({"nibble_worker_step_rows", "Token rows of one step."}, kCountBuckets)),
      sequences(registry->AddGauge({"nibble_worker_sequences", "Sequences this worker holds."})),
      pages(registry->AddGauge({"nibble_worker_kv_pages", "KV pages of the pool, 64 tokens each; 0 outside a group."})),
      page_bytes(registry->AddGauge(
          {"nibble_worker_kv_page_bytes", "Size of one KV page of this rank in bytes, all layers."})),
      load_seconds(registry->AddGauge(
          {"nibble_worker_load_seconds", "How long the last Prepare took to have the shard in memory, in seconds."})),
      epoch(registry->AddGauge({"nibble_worker_group_epoch", "Epoch of the newest group; 0 before the first."})),
      draining(registry->AddGauge({"nibble_worker_draining", "1 after SIGTERM, else 0."})),
      groups(registry->AddCounter({"nibble_worker_groups_total", "Groups this worker was asked to prepare."})),
      registry_(registry) {
  registry
      ->AddGauge({"nibble_worker_build_info",
                  "Always 1; the labels tell version, backend and model.",
                  {{"version", kVersion}, {"backend", backend}, {"model", model}}})
      .Set(1);
}

void WorkerMetrics::CountStep(const v1::StepPlan& plan, const v1::StepResult& result, double wall_seconds) {
  int64_t rows = 0;
  for (const auto& chunk : plan.prefill()) rows += chunk.num_tokens();
  if (rows > 0) prefill_rows.Increment(static_cast<double>(rows));
  if (plan.decode_slots_size() > 0) decode_rows.Increment(plan.decode_slots_size());
  rows += plan.decode_slots_size();
  steps.Increment();
  sampled_tokens.Increment(result.token_ids_size());
  plan_bytes.Increment(static_cast<double>(plan.ByteSizeLong()));
  step_rows.Observe(static_cast<double>(rows));
  step_seconds.Observe(wall_seconds);
  forward_seconds.Observe(result.forward_us() * 1e-6);
  collective_seconds.Observe(result.collective_us() * 1e-6);
  sample_seconds.Observe(result.sample_us() * 1e-6);
}

void WorkerMetrics::CountFailedStep(absl::StatusCode code) {
  registry_
      ->AddCounter({"nibble_worker_failed_steps_total",
                    "Steps that ended with an error, by status code.",
                    {{"code", absl::StatusCodeToString(code)}}})
      .Increment();
}

}  // namespace nibble
