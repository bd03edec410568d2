#include "tools/bench/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "common/base/check.h"

namespace nibble {

double Percentile(const std::vector<double>& sorted, double percent) {
  NIBBLE_CHECK_GE(percent, 0.0);
  NIBBLE_CHECK_LE(percent, 100.0);
  if (sorted.empty()) return 0;
  const double rank = percent / 100 * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(rank);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

Summary Summarize(std::vector<double> values, const std::vector<double>& percents) {
  Summary summary;
  summary.percentiles.assign(percents.size(), 0);
  if (values.empty()) return summary;
  std::sort(values.begin(), values.end());
  const double n = static_cast<double>(values.size());
  summary.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - summary.mean) * (value - summary.mean);
  summary.std = std::sqrt(squares / n);
  summary.median = Percentile(values, 50);
  for (size_t i = 0; i < percents.size(); ++i) summary.percentiles[i] = Percentile(values, percents[i]);
  return summary;
}

}  // namespace nibble
