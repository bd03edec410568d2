// A sequence's sampling parameters as plans carry them, checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "nibble/v1/worker.pb.h"

namespace nibble {

// Entries of bias_ids and of suppressed_ids: what a slot has room for on the device.
inline constexpr int64_t kMaxBiasedIds = 1024;
inline constexpr int64_t kMaxSuppressedIds = 1024;

struct SamplingParams {
  SampleRow row;           // everything that stays the same from step to step
  bool penalized = false;  // needs a history of its tokens
  bool prompt_logprobs = false;
  int32_t num_top_prompt_logprobs = 0;
  int64_t min_tokens = 0;
  std::vector<int32_t> suppressed_ids;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
};

// INVALID_ARGUMENT with field (after prefix), value and limit.
absl::StatusOr<SamplingParams> ParseSampling(const v1::StepSampling& sampling, int64_t vocab_size,
                                             const std::string& prefix);

}  // namespace nibble
