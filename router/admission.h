// Admission: a client's request becomes sequences, or INVALID_ARGUMENT that lists every violation with field, value
// and limit. Pure functions; the limits are those of inference.proto.
//
// Two moments: CheckRequest needs no tokens, so it runs before anything is spent on tokenizing; Admit runs after it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nibble/v1/inference.pb.h"
#include "router/sequence.h"

namespace nibble {

// What admission needs to know of the served model.
struct AdmitModel {
  uint32_t vocab_size = 0;
  uint32_t max_context_length = 0;  // prompt + output, tokens
  std::vector<uint32_t> eos_token_ids;
};

// Limits of the API. They bound what one request may cost; docs and tests quote them.
struct AdmitLimits {
  uint32_t max_request_id_bytes = 128;
  uint32_t max_cache_salt_bytes = 128;
  uint32_t max_chat_messages = 1024;
  int32_t max_priority = 100;  // and -100
  float max_temperature = 100;
  float max_penalty = 2;  // frequency, presence: and -2
  float max_repetition_penalty = 10;
  uint32_t max_stop_strings = 16;
  uint32_t max_stop_string_bytes = 256;
  uint32_t max_stop_ids = 64;
  uint32_t max_n = 8;
  uint32_t max_logprobs = 20;
  uint32_t max_logit_bias_entries = 300;
  float max_logit_bias = 100;  // and -100
};

// Below this a temperature means greedy: logits divided by less overflow f32.
inline constexpr float kSmallestTemperature = 1e-4f;

// One entry of google.rpc.BadRequest.
struct FieldViolation {
  std::string field;        // "sampling_params.temperature"
  std::string description;  // "is 200, must be in [0, 100]"
};

// Every violation that can be seen without the prompt's tokens; empty when there is none.
std::vector<FieldViolation> CheckRequest(const v1::GenerateRequest& request, const AdmitModel& model,
                                         const AdmitLimits& limits);

// The request's n sequences, for a prompt already tokenized. Left to the caller: id, arrival, output, deadline and
// times. An absent seed is drawn from `random_seed` (called at most once); sequence i samples with seed + i.
// max_tokens is cut to what the context leaves. Also runs CheckRequest.
absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> Admit(const v1::GenerateRequest& request,
                                                             std::vector<uint32_t> prompt_token_ids,
                                                             const AdmitModel& model, const AdmitLimits& limits,
                                                             absl::FunctionRef<uint64_t()> random_seed);

// INVALID_ARGUMENT with all violations in its message and, as payload, a google.rpc.BadRequest. OK when empty.
absl::Status InvalidRequest(const std::vector<FieldViolation>& violations);

// The payload's key, by the convention of google.rpc.Status.
inline constexpr char kBadRequestTypeUrl[] = "type.googleapis.com/google.rpc.BadRequest";

}  // namespace nibble
