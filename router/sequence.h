// One generation of one request, as the scheduler sees it: token ids in, token ids out. Text lives in output.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nibble/v1/inference.pb.h"
#include "nibble/v1/worker.pb.h"

namespace nibble {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;

// Where a sequence's events go (the request's stream). Opaque to the scheduler.
class OutputStream;

// Owned by exactly one party at a time: admission → placement → a replica's scheduler → (replay) another replica's.
struct Sequence {
  uint64_t id = 0;                          // unique in this router process
  uint32_t index = 0;                       // which of the request's n
  std::shared_ptr<OutputStream> output;

  // Fixed at admission.
  uint32_t num_prompt_tokens = 0;
  uint32_t max_tokens = 0;                  // output tokens; prompt + max_tokens ≤ model context
  bool max_tokens_open = false;             // absent in the request: a replica with few pages may cut it
  uint32_t min_tokens = 0;
  std::vector<uint32_t> stop_ids;           // sorted; EOS included unless ignore_eos; checked from min_tokens on
  v1::StepSampling sampling;
  int32_t priority = 0;                     // larger first
  uint64_t arrival = 0;                     // ties: smaller first
  TimePoint deadline = TimePoint::max();
  std::string cache_salt;
  bool use_prefix_cache = true;             // false for prompt_logprobs

  // Grows.
  std::vector<uint32_t> token_ids;          // prompt, then output
  uint32_t cached_tokens = 0;               // of the first admission: prompt tokens taken from the prefix cache
  uint32_t preemptions = 0;                 // and replays
  uint32_t replays = 0;                     // replicas lost under it; bounded, or it could take down one after another
  uint32_t prompt_logprobs_sent = 0;        // so that a replay does not send them twice

  // For metrics.
  TimePoint arrived_at{}, queued_at{}, first_scheduled_at{}, first_token_at{}, last_token_at{};

  uint32_t num_output_tokens() const { return static_cast<uint32_t>(token_ids.size()) - num_prompt_tokens; }
};

// What the scheduler tells the outside about one sequence after one step. At most one event per sequence and step; the
// event with `finish` or a non-OK `status` is its last.
struct SequenceEvent {
  std::shared_ptr<OutputStream> output;
  uint64_t sequence_id = 0;
  uint32_t index = 0;
  std::optional<uint32_t> token_id;
  std::optional<v1::RowLogprobs> logprobs;             // of token_id
  std::vector<v1::RowLogprobs> prompt_logprobs;        // of the prompt positions this step computed
  std::optional<v1::FinishReason> finish;
  std::optional<uint32_t> matched_token_id;            // finish by stop id or EOS
  v1::Usage usage;                                     // so far: a stop string ends a sequence at any token
  TimePoint first_scheduled_at{};
  absl::Status status;                                 // DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED (can never fit), ...
};

}  // namespace nibble
