// Which group this worker belongs to. At most one is current; a Prepare with a larger epoch ends it and makes the next.
// Everything the gRPC service does is one call here.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nibble/v1/worker.pb.h"
#include "worker/backend.h"
#include "worker/group.h"
#include "worker/worker_metrics.h"

namespace nibble {

class Membership {
 public:
  // backend and metrics outlive this.
  Membership(Backend* backend, WorkerMetrics* metrics, int64_t kv_memory_bytes);
  ~Membership();  // ends every group and waits for their threads

  // FAILED_PRECONDITION when the versions differ, naming both.
  absl::StatusOr<v1::WorkerInfo> GetInfo(const v1::GetInfoRequest& request) const;
  // `done` exactly once. FAILED_PRECONDITION for an epoch that is not larger than every one before, INVALID_ARGUMENT
  // for rank and size, UNAVAILABLE while draining, ABORTED when a larger epoch took over meanwhile.
  void Prepare(const v1::PrepareRequest& request, Group::PrepareDone done);
  // `done` exactly once. FAILED_PRECONDITION unless the epoch is the current one and prepared.
  void Join(const v1::JoinRequest& request, Group::JoinDone done);
  void Abort(const v1::AbortRequest& request);
  // The group that executes plans of that epoch; FAILED_PRECONDITION when it is not the current one.
  absl::StatusOr<std::shared_ptr<Group>> GroupOf(uint64_t epoch) const;

  // From now on GetInfo says draining and Prepare is refused.
  void StartDraining();
  // Waits until no sequence is left, at most `timeout`, then ends the group with UNAVAILABLE. True when none was left.
  bool Drain(std::chrono::milliseconds timeout);

 private:
  // Groups that were superseded while they load or meet: each ends by itself within its timeout. More than this many
  // at once means a router gone wild.
  static constexpr size_t kMaxRetired = 8;

  Backend* const backend_;
  WorkerMetrics* const metrics_;
  const int64_t kv_memory_bytes_;
  const v1::ModelInfo model_;
  const uint64_t instance_;
  EngineSlot slot_;

  mutable std::mutex mutex_;  // guards everything below
  bool draining_ = false;
  uint64_t epoch_ = 0;  // the largest seen
  std::shared_ptr<Group> current_;
  std::vector<std::shared_ptr<Group>> retired_;  // kept until their threads have ended
};

}  // namespace nibble
