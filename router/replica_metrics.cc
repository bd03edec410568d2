#include "router/replica_metrics.h"

#include <ctime>

#include "common/metrics/buckets.h"

namespace nibble {

double ThreadCpuSeconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

namespace {

struct Maker {
  MetricRegistry* registry;
  std::map<std::string, std::string> labels;

  Gauge& NewGauge(const char* name, const char* help) const { return registry->AddGauge({name, help, labels}); }
  Counter& NewCounter(const char* name, const char* help) const { return registry->AddCounter({name, help, labels}); }
  Counter& NewCpu(const char* part) const {
    auto with_part = labels;
    with_part["part"] = part;
    return registry->AddCounter({"nibble_router_step_cpu_seconds_total",
                                 "CPU seconds per replica: schedule, commit and other are its scheduler thread, send its sender.", with_part});
  }
  Histogram& NewHistogram(const char* name, const char* help, std::span<const double> buckets) const {
    return registry->AddHistogram({name, help, labels}, buckets);
  }
};

Maker For(MetricRegistry* registry, const std::string& model, uint32_t replica) {
  return {registry, {{"model_name", model}, {"replica", std::to_string(replica)}}};
}

void CountUp(Counter* counter, uint64_t now, uint64_t before) {
  if (now > before) counter->Increment(static_cast<double>(now - before));
}

}  // namespace

ReplicaMetrics::ReplicaMetrics(MetricRegistry* r, const std::string& m, uint32_t i)
    : registry_(r),
      labels_(For(r, m, i).labels),
      ready_(For(r, m, i).NewGauge("nibble_router_replica_ready", "1 when the replica takes requests.")),
      running_(For(r, m, i).NewGauge("nibble_num_requests_running", "Sequences in the running batch.")),
      waiting_(For(r, m, i).NewGauge("nibble_num_requests_waiting", "Sequences waiting for a place in the batch.")),
      kv_usage_(For(r, m, i).NewGauge("nibble_kv_cache_usage_perc",
                                      "Share of KV pages used by running sequences, 0 to 1.")),
      pages_(For(r, m, i).NewGauge("nibble_kv_cache_pages", "KV pages of the replica.")),
      free_pages_(For(r, m, i).NewGauge("nibble_kv_cache_free_pages", "KV pages no running sequence uses.")),
      cached_pages_(For(r, m, i).NewGauge("nibble_kv_cache_cached_pages", "KV pages that hold a reusable prefix.")),
      failures_(For(r, m, i).NewCounter("nibble_router_replica_failures_total", "Times the replica went down.")),
      replayed_(For(r, m, i).NewCounter("nibble_router_sequences_lost_total",
                                        "Unfinished sequences taken from the replica when it went down.")),
      preemptions_(For(r, m, i).NewCounter("nibble_num_preemptions_total", "Sequences preempted for want of KV pages.")),
      prefix_queries_(For(r, m, i).NewCounter("nibble_prefix_cache_queries_total",
                                              "Prompt tokens looked up in the prefix cache.")),
      prefix_hits_(For(r, m, i).NewCounter("nibble_prefix_cache_hits_total",
                                           "Prompt tokens taken from the prefix cache.")),
      prompt_tokens_(For(r, m, i).NewCounter("nibble_prompt_tokens_total", "Prompt tokens of started sequences.")),
      generation_tokens_(For(r, m, i).NewCounter("nibble_generation_tokens_total", "Tokens generated.")),
      steps_(For(r, m, i).NewCounter("nibble_router_steps_total", "Plans sent.")),
      schedule_cpu_(For(r, m, i).NewCpu("schedule")),
      commit_cpu_(For(r, m, i).NewCpu("commit")),
      other_cpu_(For(r, m, i).NewCpu("other")),
      send_cpu_(For(r, m, i).NewCpu("send")),
      plan_bytes_(For(r, m, i).NewCounter("nibble_router_plan_bytes_total", "Serialized plans, bytes, one rank's.")),
      forward_(For(r, m, i).NewHistogram("nibble_router_step_forward_seconds",
                                         "Seconds of a step on the replica's slowest rank.", kStepBuckets)),
      round_trip_(For(r, m, i).NewHistogram("nibble_router_step_round_trip_seconds",
                                            "Seconds from sending a plan to the last rank's answer, run-ahead included.",
                                            kStepBuckets)),
      rows_(For(r, m, i).NewHistogram("nibble_iteration_tokens_total", "Rows of a step: prompt tokens and decoded tokens.", kCountBuckets)) {}

void ReplicaMetrics::SetReady(bool ready) { ready_.Set(ready ? 1 : 0); }
void ReplicaMetrics::CountFailure() { failures_.Increment(); }
void ReplicaMetrics::CountReplayed(size_t sequences) { replayed_.Increment(static_cast<double>(sequences)); }
void ReplicaMetrics::Reset() { last_ = {}; }

void ReplicaMetrics::SetCapacity(uint32_t num_pages, uint32_t page_tokens) {
  auto labels = labels_;
  labels["block_size"] = std::to_string(page_tokens);
  labels["num_gpu_blocks"] = std::to_string(num_pages);
  labels["capacity_tokens"] = std::to_string(uint64_t{num_pages} * page_tokens);
  if (capacity_ != nullptr) capacity_->Set(0);
  capacity_ = &registry_->AddGauge({"nibble_cache_config_info",
                                    "1 for the KV pool a replica has: pages (num_gpu_blocks), tokens per page "
                                    "(block_size) and tokens in all. 0 for one it had.",
                                    labels});
  capacity_->Set(1);
}

void ReplicaMetrics::Update(const SchedulerStats& stats) {
  running_.Set(stats.running);
  waiting_.Set(stats.waiting);
  const uint32_t used = stats.total_pages - stats.free_pages;
  kv_usage_.Set(stats.total_pages == 0 ? 0 : static_cast<double>(used) / stats.total_pages);
  pages_.Set(stats.total_pages);
  free_pages_.Set(stats.free_pages);
  cached_pages_.Set(stats.cached_pages);
  CountUp(&preemptions_, stats.preemptions, last_.preemptions);
  CountUp(&prefix_queries_, stats.prefix_queries_tokens, last_.prefix_queries_tokens);
  CountUp(&prefix_hits_, stats.prefix_hits_tokens, last_.prefix_hits_tokens);
  CountUp(&prompt_tokens_, stats.prompt_tokens, last_.prompt_tokens);
  CountUp(&generation_tokens_, stats.generation_tokens, last_.generation_tokens);
  last_ = stats;
}

void ReplicaMetrics::Count(const Cpu& cpu) {
  schedule_cpu_.Increment(cpu.schedule_seconds);
  commit_cpu_.Increment(cpu.commit_seconds);
  other_cpu_.Increment(cpu.other_seconds);
}

void ReplicaMetrics::CountSend(double cpu_seconds, size_t plan_bytes) {
  steps_.Increment();
  send_cpu_.Increment(cpu_seconds);
  plan_bytes_.Increment(static_cast<double>(plan_bytes));
}

void ReplicaMetrics::ObserveStep(double forward_seconds, double round_trip_seconds, size_t rows) {
  forward_.Observe(forward_seconds);
  round_trip_.Observe(round_trip_seconds);
  rows_.Observe(static_cast<double>(rows));
}

}  // namespace nibble
