#include "worker/model/sampling_params.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace nibble {
namespace {

absl::Status Bad(const std::string& prefix, const char* field, double value, const std::string& limit) {
  return absl::InvalidArgumentError(absl::StrCat(prefix, field, " is ", value, ", must be ", limit));
}

absl::Status CheckIds(const std::string& prefix, const char* field,
                      const google::protobuf::RepeatedField<uint32_t>& ids, int64_t max_ids, int64_t vocab_size) {
  if (ids.size() > max_ids) {
    return absl::InvalidArgumentError(
        absl::StrCat(prefix, field, " has ", ids.size(), " entries, at most ", max_ids, " are allowed"));
  }
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(prefix, field, "[", i, "] is ", ids[i], ", the vocabulary has ", vocab_size, " tokens"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SamplingParams> ParseSampling(const v1::StepSampling& s, int64_t vocab_size, const std::string& prefix) {
  // Written so that a NaN fails each of them.
  if (!(s.temperature() >= 0 && std::isfinite(s.temperature())))
    return Bad(prefix, "temperature", s.temperature(), "finite and at least 0");
  if (!(s.top_p() > 0 && s.top_p() <= 1)) return Bad(prefix, "top_p", s.top_p(), "above 0 and at most 1");
  if (!(s.min_p() >= 0 && s.min_p() <= 1)) return Bad(prefix, "min_p", s.min_p(), "0..1");
  if (!(s.repetition_penalty() > 0 && std::isfinite(s.repetition_penalty()))) {
    return Bad(prefix, "repetition_penalty", s.repetition_penalty(), "finite and above 0");
  }
  if (!std::isfinite(s.presence_penalty())) return Bad(prefix, "presence_penalty", s.presence_penalty(), "finite");
  if (!std::isfinite(s.frequency_penalty())) return Bad(prefix, "frequency_penalty", s.frequency_penalty(), "finite");
  const std::string top_limit = absl::StrCat("at most ", kMaxTopLogprobs);
  if (s.num_top_logprobs() > kMaxTopLogprobs) return Bad(prefix, "num_top_logprobs", s.num_top_logprobs(), top_limit);
  if (s.num_top_prompt_logprobs() > kMaxTopLogprobs) {
    return Bad(prefix, "num_top_prompt_logprobs", s.num_top_prompt_logprobs(), top_limit);
  }
  NIBBLE_RETURN_IF_ERROR(CheckIds(prefix, "suppressed_ids", s.suppressed_ids(), kMaxSuppressedIds, vocab_size));
  NIBBLE_RETURN_IF_ERROR(CheckIds(prefix, "bias_ids", s.bias_ids(), kMaxBiasedIds, vocab_size));
  if (s.bias_values_size() != s.bias_ids_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(prefix, "bias_values has ", s.bias_values_size(), " entries, bias_ids has ", s.bias_ids_size()));
  }
  for (const float value : s.bias_values()) {
    if (!std::isfinite(value)) return Bad(prefix, "bias_values", value, "finite");
  }

  SamplingParams params;
  params.row.temperature = s.temperature();
  params.row.top_p = s.top_p();
  params.row.min_p = s.min_p();
  params.row.repetition_penalty = s.repetition_penalty();
  params.row.presence_penalty = s.presence_penalty();
  params.row.frequency_penalty = s.frequency_penalty();
  params.row.seed = s.seed();
  params.row.top_k = s.top_k() >= vocab_size ? 0 : static_cast<int32_t>(s.top_k());
  params.row.num_logprobs =
      s.logprobs() ? static_cast<int32_t>(std::min<int64_t>(s.num_top_logprobs(), vocab_size)) : -1;
  params.penalized = s.repetition_penalty() != 1 || s.presence_penalty() != 0 || s.frequency_penalty() != 0;
  params.prompt_logprobs = s.prompt_logprobs();
  params.num_top_prompt_logprobs = static_cast<int32_t>(std::min<int64_t>(s.num_top_prompt_logprobs(), vocab_size));
  params.min_tokens = s.min_tokens();
  params.suppressed_ids.assign(s.suppressed_ids().begin(), s.suppressed_ids().end());
  params.bias_ids.assign(s.bias_ids().begin(), s.bias_ids().end());
  params.bias_values.assign(s.bias_values().begin(), s.bias_values().end());
  return params;
}

}  // namespace nibble
