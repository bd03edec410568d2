// Prometheus metrics behind one small page. Everything is created at start-up and lives as long as the registry; hot
// paths keep references, so counting is one atomic addition and observing one uncontended mutex.
//
//   MetricRegistry metrics;
//   auto& steps = metrics.AddCounter({"nibble_worker_steps_total", "Executed steps."});
//   auto& ttft = metrics.AddHistogram({"nibble_time_to_first_token_seconds", "..."}, kLatencyBuckets);
//   steps.Increment();
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <memory>
#include <span>
#include <string>

namespace nibble {

using Counter = prometheus::Counter;
using Gauge = prometheus::Gauge;
using Histogram = prometheus::Histogram;

struct MetricSpec {
  std::string name;                           // nibble_..., unit as suffix: _seconds, _bytes, _total for counters
  std::string help;                           // one sentence, with the unit
  std::map<std::string, std::string> labels;  // fixed; one family has one set of label names
};

class MetricRegistry {
 public:
  // With the process_* metrics of every Prometheus client (cpu seconds, resident bytes, open files, start time).
  MetricRegistry();

  // The same name with other label values is another member of the family; with the same ones, the same metric. A name
  // that Prometheus does not allow, or that already has another type, is a bug. Any thread.
  Counter& AddCounter(const MetricSpec& spec);
  Gauge& AddGauge(const MetricSpec& spec);
  // `buckets` are ascending upper bounds, inclusive.
  Histogram& AddHistogram(const MetricSpec& spec, std::span<const double> buckets);

  // The text a scrape returns.
  std::string Text() const;

 private:
  friend class MetricsServer;
  // Shared because the exposer holds them weakly.
  std::shared_ptr<prometheus::Registry> registry_;
  std::shared_ptr<prometheus::Collectable> process_;
};

}  // namespace nibble
