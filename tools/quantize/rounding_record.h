// What quantizing cost, linear by linear, as the quantizer saw it: written beside the tensors, because the weights that
// were rounded (rotated, scaled, reordered) exist nowhere else. `nibble-quantize report` reads it.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

// In the output directory; for people and tools, never read by a worker.
inline constexpr char kRoundingRecordFile[] = "rounding_record.json";

struct LinearCost {
  std::string name;         // "model.layers.0.self_attn.q_proj"
  double weight_error = 0;  // |W - Ŵ| / |W|, Frobenius norms, W after the transforms
  double output_error = 0;  // the same of the outputs, for calibration inputs: sqrt(tr ΔHΔᵀ / tr WHWᵀ)
  std::string fallback;     // why rounding to nearest was used instead of compensation; empty when it was not
};

// |W - Ŵ| / |W|, both [N, K] in one order.
double WeightError(std::span<const float> weight, std::span<const float> rounded);

std::string FormatRoundingRecord(const std::vector<LinearCost>& linears);
// NOT_FOUND when the directory has none (other quantizers write none); INVALID_ARGUMENT with file and reason.
absl::StatusOr<std::vector<LinearCost>> LoadRoundingRecord(const std::string& dir);

}  // namespace nibble
