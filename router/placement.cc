#include "router/placement.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"

namespace nibble {
namespace {

uint32_t UncachedTokens(const ReplicaSnapshot& replica, const PlacementRequest& request) {
  return request.num_prompt_tokens - std::min(replica.cached_prefix_tokens, request.num_prompt_tokens);
}

// Whether the request would wait there for a slot, for pages, or behind somebody who does.
bool WouldQueue(const ReplicaSnapshot& replica, const PlacementRequest& request) {
  const uint64_t pages = (uint64_t{UncachedTokens(replica, request)} + request.page_tokens - 1) / request.page_tokens;
  return uint64_t{replica.running} + replica.waiting + request.num_sequences > replica.max_sequences ||
         pages + request.num_sequences > replica.free_pages;
}

absl::Status NoneReady(size_t num_replicas, absl::Duration retry_delay) {
  absl::Status status = absl::UnavailableError(absl::StrCat(
      "no replica is ready (", num_replicas, " configured), retry in ", absl::FormatDuration(retry_delay)));
  google::rpc::RetryInfo retry;
  const int64_t nanoseconds = absl::ToInt64Nanoseconds(retry_delay);
  retry.mutable_retry_delay()->set_seconds(nanoseconds / 1'000'000'000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(nanoseconds % 1'000'000'000));
  status.SetPayload(kRetryInfoTypeUrl, absl::Cord(retry.SerializeAsString()));
  return status;
}

}  // namespace

uint64_t PlacementCost(const ReplicaSnapshot& replica, const PlacementRequest& request) {
  return UncachedTokens(replica, request) + replica.waiting_prompt_tokens +
         uint64_t{kExpectedOutputTokens} * (uint64_t{replica.running} + replica.waiting);
}

absl::StatusOr<uint32_t> PickReplica(absl::Span<const ReplicaSnapshot> replicas, const PlacementRequest& request,
                                     absl::Duration retry_delay) {
  const auto rank = [&](const ReplicaSnapshot& r) {
    return std::tuple(WouldQueue(r, request), PlacementCost(r, request), uint64_t{r.running} + r.waiting, r.replica);
  };
  const ReplicaSnapshot* best = nullptr;
  for (const ReplicaSnapshot& replica : replicas) {
    if (replica.ready && (best == nullptr || rank(replica) < rank(*best))) best = &replica;
  }
  if (best == nullptr) return NoneReady(replicas.size(), retry_delay);
  return best->replica;
}

}  // namespace nibble
