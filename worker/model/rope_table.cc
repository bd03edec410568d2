#include "worker/model/rope_table.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>

namespace nibble {

std::vector<double> RopeInverseFrequencies(const ModelConfig& config) {
  const int64_t half = config.head_dim / 2;
  std::vector<double> frequencies(static_cast<size_t>(half));
  for (int64_t d = 0; d < half; ++d) {
    double& frequency = frequencies[static_cast<size_t>(d)];
    frequency = std::pow(config.rope_theta, -2.0 * static_cast<double>(d) / static_cast<double>(config.head_dim));
    if (!config.rope_scaling) continue;
    const RopeScaling& scaling = *config.rope_scaling;
    // How often the pair turns within the context the model was first trained on.
    const double turns = static_cast<double>(scaling.original_max_position) * frequency / (2 * std::numbers::pi);
    if (turns > scaling.high_freq_factor) continue;
    if (turns < scaling.low_freq_factor) {
      frequency /= scaling.factor;
    } else {
      const double kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
      frequency *= kept + (1 - kept) / scaling.factor;
    }
  }
  return frequencies;
}

std::vector<float> RopeTable(const ModelConfig& config) {
  const std::vector<double> frequencies = RopeInverseFrequencies(config);
  const size_t half = frequencies.size();
  std::vector<float> table(static_cast<size_t>(config.max_position_embeddings) * 2 * half);
  for (int64_t position = 0; position < config.max_position_embeddings; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * 2 * half;
    for (size_t d = 0; d < half; ++d) {
      const double angle = static_cast<double>(position) * frequencies[d];
      row[d] = static_cast<float>(std::cos(angle));
      row[half + d] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

}  // namespace nibble
