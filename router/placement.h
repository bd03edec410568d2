// Placement: which replica serves a request.
//
// Everything is counted in rows, the unit a replica works in: one row is one token through the model. Placing a request
// costs the rows of its prompt that are not cached there, plus the rows that stand before or beside it: prompts that
// wait, and what the running and waiting sequences may still generate. The smallest cost wins. A cached prefix thus
// counts for exactly the rows it saves and no more, so affinity cannot pile requests onto one replica; and a replica
// that would have to queue the request loses against one that would not, whatever it has cached.
//
// Sources: NVIDIA Dynamo's KV router (cost = uncached prefill blocks + active decode blocks, accounted by the router
// itself); the load guard that prefix affinity needs is the lesson of SGLang issues 14305 and 14532 and of the
// production-stack's `loadaware` score.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace nibble {

// One replica as the router sees it at this moment: SchedulerStats, plus what was sent to it and not yet counted there.
struct ReplicaSnapshot {
  uint32_t replica = 0;
  bool ready = false;
  uint32_t running = 0, waiting = 0;  // sequences
  uint32_t max_sequences = 0;         // slots
  uint64_t waiting_prompt_tokens = 0;
  uint32_t free_pages = 0, total_pages = 0;  // free includes cached and unreferenced
  uint32_t cached_prefix_tokens = 0;         // of this request's prompt, by the prefix index
};

struct PlacementRequest {
  uint32_t num_prompt_tokens = 0;
  uint32_t num_sequences = 1;  // n: they are placed together and share the prompt
  uint32_t page_tokens = 64;
};

// Rows a sequence is expected to generate yet: what one more neighbour costs.
inline constexpr uint32_t kExpectedOutputTokens = 256;

// The replica to use: ReplicaSnapshot::replica. Equal costs: the one with fewer sequences, then the smallest id.
// UNAVAILABLE, with a google.rpc.RetryInfo payload saying `retry_delay`, when none is ready.
absl::StatusOr<uint32_t> PickReplica(absl::Span<const ReplicaSnapshot> replicas, const PlacementRequest& request,
                                     absl::Duration retry_delay = absl::Seconds(1));

// The rows that placing the request there costs. For tests and for logs.
uint64_t PlacementCost(const ReplicaSnapshot& replica, const PlacementRequest& request);

inline constexpr char kRetryInfoTypeUrl[] = "type.googleapis.com/google.rpc.RetryInfo";

}  // namespace nibble
