// What a list of measurements says, with numpy's definitions: the ones `vllm bench serve` prints.
#pragma once

#include <vector>

namespace nibble {

// Linear interpolation between closest ranks (numpy's default). `sorted` ascending; percent 0..100; 0 when empty.
double Percentile(const std::vector<double>& sorted, double percent);

struct Summary {
  double mean = 0;
  double median = 0;
  double std = 0;                   // of the population
  std::vector<double> percentiles;  // of the asked-for percents, in their order
};
// All zero for no values.
Summary Summarize(std::vector<double> values, const std::vector<double>& percents);

}  // namespace nibble
