#include "common/metrics/registry.h"

#include <prometheus/family.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "common/metrics/process.h"

namespace nibble {
namespace {

// The library throws for bad names and type clashes, both of which are bugs of ours.
template <typename Builder, typename... Args>
auto& Add(Builder builder, prometheus::Registry& registry, const MetricSpec& spec, Args&&... args) {
  try {
    return builder.Name(spec.name).Help(spec.help).Register(registry).Add(spec.labels, std::forward<Args>(args)...);
  } catch (const std::exception& e) {
    internal::CheckFailed(__FILE__, __LINE__, "a valid metric", spec.name + ": " + e.what());
  }
}

}  // namespace

MetricRegistry::MetricRegistry()
    : registry_(std::make_shared<prometheus::Registry>()), process_(std::make_shared<ProcessMetrics>()) {}

Counter& MetricRegistry::AddCounter(const MetricSpec& spec) {
  return Add(prometheus::BuildCounter(), *registry_, spec);
}

Gauge& MetricRegistry::AddGauge(const MetricSpec& spec) { return Add(prometheus::BuildGauge(), *registry_, spec); }

Histogram& MetricRegistry::AddHistogram(const MetricSpec& spec, std::span<const double> buckets) {
  return Add(prometheus::BuildHistogram(), *registry_, spec,
             Histogram::BucketBoundaries(buckets.begin(), buckets.end()));
}

std::string MetricRegistry::Text() const {
  std::vector<prometheus::MetricFamily> families = registry_->Collect();
  for (prometheus::MetricFamily& family : process_->Collect()) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace nibble
