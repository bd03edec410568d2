#include "worker/execute_stream.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace nibble {

ExecuteStream* ExecuteStream::Start(Membership* membership) {
  std::shared_ptr<ExecuteStream> stream(new ExecuteStream(membership));
  stream->self_ = stream;
  stream->Pump();
  return stream.get();
}

void ExecuteStream::Pump() {
  while (true) {
    enum { kRead, kWrite, kFinish } action;
    const v1::StepResult* result = nullptr;
    absl::Status end;
    {
      std::lock_guard lock(mutex_);
      if (finish_started_) return;
      if (!writing_ && !results_.empty()) {
        action = kWrite;
        writing_ = true;
        result = &results_.front();  // a deque's elements stay where they are while others are pushed
      } else if (end_.has_value()) {
        // A started read may stay open: gRPC completes it. But StartRead itself must have returned, for after Finish
        // this object may be gone.
        if (writing_ || starting_read_) return;
        action = kFinish;
        finish_started_ = true;
        end = *end_;
      } else if (want_read_ && !starting_read_) {
        action = kRead;
        want_read_ = false;
        starting_read_ = true;
      } else {
        return;
      }
    }
    switch (action) {
      case kWrite:
        StartWrite(result);
        break;
      case kRead: {
        StartRead(&plan_);
        std::lock_guard lock(mutex_);
        starting_read_ = false;
        break;
      }
      case kFinish:
        grpc::ServerBidiReactor<v1::StepPlan, v1::StepResult>::Finish(ToGrpcStatus(end, Audience::kPeer));
        return;
    }
  }
}

void ExecuteStream::OnReadDone(bool ok) {
  if (!ok) {  // half-closed by the router, or the stream is over
    if (group_ != nullptr) {
      group_->EndInput(this);
    } else {
      Finish(absl::OkStatus());
    }
    return;
  }
  if (const absl::Status status = TakePlan(); !status.ok()) {
    if (group_ != nullptr) group_->DropStream(this);
    Finish(status);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    want_read_ = true;
  }
  Pump();
}

absl::Status ExecuteStream::TakePlan() {
  if (group_ == nullptr) {
    NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<Group> group, membership_->GroupOf(plan_.epoch()));
    std::shared_ptr<ExecuteStream> self;
    {
      std::lock_guard lock(mutex_);
      self = self_;
    }
    NIBBLE_RETURN_IF_ERROR(group->OpenStream(std::move(self)));
    group_ = std::move(group);
  }
  v1::StepPlan plan;
  plan.Swap(&plan_);
  return group_->Submit(this, std::move(plan));
}

bool ExecuteStream::Write(v1::StepResult result) {
  {
    std::lock_guard lock(mutex_);
    if (end_.has_value()) return false;
    if (results_.size() < kMaxUnsentResults) {
      results_.push_back(std::move(result));
    } else {
      end_ = absl::ResourceExhaustedError(absl::StrCat("the router does not read: ", results_.size(),
                                                       " results are unsent, the limit is ", kMaxUnsentResults));
    }
  }
  Pump();
  return true;
}

void ExecuteStream::Finish(const absl::Status& status) {
  {
    std::lock_guard lock(mutex_);
    if (end_.has_value()) return;
    end_ = status;
  }
  Pump();
}

void ExecuteStream::OnWriteDone(bool ok) {
  {
    std::lock_guard lock(mutex_);
    writing_ = false;
    results_.pop_front();
    if (!ok) {  // nobody is there to read the others
      results_.clear();
      if (!end_.has_value()) end_ = absl::CancelledError("the router is gone");
    }
  }
  Pump();
}

void ExecuteStream::OnCancel() {
  {
    std::lock_guard lock(mutex_);
    if (!writing_) {
      results_.clear();
    } else {
      results_.resize(1);
    }
    if (!end_.has_value()) end_ = absl::CancelledError("the router is gone");
  }
  Pump();
}

void ExecuteStream::OnDone() {
  // The last reaction: no read is open any more, so group_ is this thread's alone.
  if (group_ != nullptr) group_->DropStream(this);
  group_ =
      nullptr;  // the group's thread may hold this stream a moment longer, and must not be the last to hold the group
  std::shared_ptr<ExecuteStream> self;
  std::lock_guard lock(mutex_);
  self = std::move(self_);
}

}  // namespace nibble
