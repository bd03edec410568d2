// What one replica's thread counts. Plain atomics, written once per step, read by a scrape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "common/metrics/registry.h"
#include "router/scheduler.h"

namespace nibble {

// CPU time of the calling thread, seconds.
double ThreadCpuSeconds();

// Splits a thread's CPU time among what it does.
class CpuMeter {
 public:
  // Everything since the last call, or since construction on the same thread, was spent on this.
  void Charge(double* seconds) {
    const double now = ThreadCpuSeconds();
    *seconds += now - last_;
    last_ = now;
  }

 private:
  double last_ = ThreadCpuSeconds();
};

class ReplicaMetrics {
 public:
  ReplicaMetrics(MetricRegistry* registry, const std::string& model_name, uint32_t replica);

  void SetReady(bool ready);
  void CountFailure();
  void CountReplayed(size_t sequences);
  // The scheduler's totals start from zero with every incarnation; Reset says so.
  void Update(const SchedulerStats& stats);
  // The KV pool of the incarnation that begins, as an info metric: its labels are the values.
  void SetCapacity(uint32_t num_pages, uint32_t page_tokens);
  void Reset();

  // CPU of the replica's thread: `other` is its inbox, its metrics, everything around the verbs.
  struct Cpu {
    double schedule_seconds = 0, commit_seconds = 0, other_seconds = 0;
  };
  void Count(const Cpu& cpu);
  // A plan on its way to all ranks: the sending thread's CPU, and its size.
  void CountSend(double cpu_seconds, size_t plan_bytes);
  // Of a step whose result is in: the ranks' slowest forward pass, and the time from sending to the last answer.
  void ObserveStep(double forward_seconds, double round_trip_seconds, size_t rows);

 private:
  MetricRegistry* const registry_;
  const std::map<std::string, std::string> labels_;
  Gauge* capacity_ = nullptr;
  Gauge &ready_, &running_, &waiting_, &kv_usage_, &pages_, &free_pages_, &cached_pages_;
  Counter &failures_, &replayed_, &preemptions_, &prefix_queries_, &prefix_hits_, &prompt_tokens_,
      &generation_tokens_, &steps_, &schedule_cpu_, &commit_cpu_, &other_cpu_, &send_cpu_,
      &plan_bytes_;
  Histogram &forward_, &round_trip_, &rows_;
  SchedulerStats last_;
};

}  // namespace nibble
