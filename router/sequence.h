// One generation of one request, as the scheduler sees it: token ids in, token ids out. Text lives in output.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "nibble/v1/inference.pb.h"
#include "nibble/v1/worker.pb.h"

namespace nibble {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;

// Where a sequence's events go (the request's stream). Opaque to the scheduler.
class OutputStream;

// Owned by exactly one party at a time: admission → placement → a replica's scheduler → (replay) another replica's.
// What every token touches comes first, in one cache line.
struct alignas(64) Sequence {
  std::vector<uint32_t> token_ids;          // prompt, then output
  absl::InlinedVector<uint32_t, 4> stop_ids;  // sorted; EOS included unless ignore_eos; checked from min_tokens on
  uint32_t num_prompt_tokens = 0;
  uint32_t max_tokens = 0;                  // output tokens; prompt + max_tokens ≤ model context
  uint32_t min_tokens = 0;
  uint32_t cached_tokens = 0;               // of the first admission: prompt tokens taken from the prefix cache

  uint64_t id = 0;                          // unique in this router process; a request's n have consecutive ones
  uint32_t index = 0;                       // which of the request's n
  uint32_t preemptions = 0;                 // and replays
  TimePoint first_scheduled_at{};
  std::shared_ptr<OutputStream> output;

  // Fixed at admission.
  bool max_tokens_open = false;             // absent in the request: a replica with few pages may cut it
  v1::StepSampling sampling;
  int32_t priority = 0;                     // larger first
  uint64_t arrival = 0;                     // ties: smaller first
  TimePoint deadline = TimePoint::max();
  std::string cache_salt;
  bool use_prefix_cache = true;             // false for prompt_logprobs

  // Grows.
  uint32_t replays = 0;                     // replicas lost under it; bounded, or it could take down one after another
  uint32_t prompt_logprobs_sent = 0;        // so that a replay does not send them twice

  uint32_t num_output_tokens() const { return static_cast<uint32_t>(token_ids.size()) - num_prompt_tokens; }
};

// Log-probabilities that a step brought for one sequence.
struct SequenceScores {
  std::optional<v1::RowLogprobs> logprobs;             // of the sampled token
  std::vector<v1::RowLogprobs> prompt_logprobs;        // of the prompt positions this step computed
};

// What the scheduler tells the outside about one sequence after one step; the event with `finish` or a non-OK `status`
// is its last. A step makes hundreds of them, hence a record of one cache line that owns nothing in the common case;
// whose stream it belongs to follows from the id (OutputPool). Prompt scores come as events of their own.
struct SequenceEvent {
  uint64_t sequence_id = 0;
  TimePoint at{};
  std::optional<uint32_t> token_id;
  std::optional<v1::FinishReason> finish;              // STOP: token_id is one of stop_ids
  absl::Status status;                                 // DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED (can never fit), ...
  uint32_t cached_tokens = 0, preemptions = 0;         // so far: a stop string ends a sequence at any token
  TimePoint first_scheduled_at{};
  std::unique_ptr<SequenceScores> scores;
};
static_assert(sizeof(SequenceEvent) == 64);

}  // namespace nibble
