// One Execute stream: plans in, results out, each strictly in order. gRPC allows one read and one write at a time, and
// nothing after Finish; reads, writes and the end come from different threads. So one function, Pump, decides under
// the lock what may start next, and starts it outside of the lock.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "absl/status/status.h"
#include "nibble/v1/worker.grpc.pb.h"
#include "worker/group.h"
#include "worker/membership.h"

namespace nibble {

class ExecuteStream final : public grpc::ServerBidiReactor<v1::StepPlan, v1::StepResult>, public ResultSink {
 public:
  // The stream owns itself until gRPC is done with it; the group shares it.
  static ExecuteStream* Start(Membership* membership);

  // ResultSink. A router that does not read ends its stream with RESOURCE_EXHAUSTED.
  bool Write(v1::StepResult result) override;
  void Finish(const absl::Status& status) override;

 private:
  // Every result answers a plan, and a group queues fewer plans than this.
  static constexpr size_t kMaxUnsentResults = 4 * Group::kMaxQueuedPlans;

  explicit ExecuteStream(Membership* membership) : membership_(membership) {}

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  absl::Status TakePlan();
  void Pump();

  Membership* const membership_;
  v1::StepPlan plan_;             // the read in progress
  std::shared_ptr<Group> group_;  // OnReadDone's and, once no read is left, OnDone's

  std::mutex mutex_;  // guards everything below
  bool want_read_ = true;
  bool starting_read_ = false;  // a thread is inside StartRead
  bool writing_ = false;        // from StartWrite to OnWriteDone; writes results_.front()
  bool finish_started_ = false;
  std::optional<absl::Status> end_;  // how to finish, once all results are written
  std::deque<v1::StepResult> results_;
  std::shared_ptr<ExecuteStream> self_;  // until OnDone
};

}  // namespace nibble
