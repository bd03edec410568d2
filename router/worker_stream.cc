#include "router/worker_stream.h"

#include <chrono>
#include <string>
#include <utility>

#include "common/base/check.h"
#include "common/rpc/status.h"

namespace nibble {

WorkerStream::WorkerStream(std::shared_ptr<grpc::Channel> channel, uint32_t rank, WorkerStreamObserver* observer)
    : rank_(rank), observer_(observer), stub_(std::move(channel)) {
  stub_.PrepareBidiStreamingCall(&context_, "/nibble.v1.Worker/Execute", grpc::StubOptions(), this);
  AddHold();  // Send starts writes from outside the reactions
  StartRead(&result_);
  StartCall();
}

WorkerStream::~WorkerStream() { NIBBLE_CHECK(done_, "a stream is closed before it is destroyed"); }

void WorkerStream::Send(const grpc::ByteBuffer& plan) {
  const grpc::ByteBuffer* first = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (broken_ || closed_) return;
    unsent_.push_back(plan);  // of references
    if (!writing_) {
      writing_ = true;
      first = &unsent_.front();
    }
  }
  if (first != nullptr) StartWrite(first);  // without the lock: the write may complete inside
}

void WorkerStream::OnWriteDone(bool ok) {
  const grpc::ByteBuffer* next = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    unsent_.pop_front();
    if (!ok || broken_ || closed_) unsent_.clear();
    writing_ = !unsent_.empty();
    if (writing_) next = &unsent_.front();
  }
  if (next != nullptr) StartWrite(next);
}

void WorkerStream::OnReadDone(bool ok) {
  absl::Status why;
  if (ok) {
    v1::StepResult result;
    if (grpc::SerializationTraits<v1::StepResult>::Deserialize(&result_, &result).ok()) {
      observer_->OnResult(rank_, std::move(result));
      StartRead(&result_);
      return;
    }
    why = absl::InternalError("sent a result that is not a StepResult");
    context_.TryCancel();
  }
  bool tell = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    broken_ = true;
    tell = !closed_;
  }
  if (tell) observer_->OnBroken(rank_, std::move(why));
}

absl::Status WorkerStream::Close() {
  bool cancel = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    NIBBLE_CHECK(!closed_, "a stream is closed once");
    closed_ = true;
    cancel = !broken_;
  }
  // A broken stream has a status on its way; cancelling would hide it, but it must not be waited for without end either.
  if (cancel) context_.TryCancel();
  RemoveHold();
  std::unique_lock<std::mutex> lock(mutex_);
  if (!done_changed_.wait_for(lock, std::chrono::seconds(1), [this] { return done_; })) {
    context_.TryCancel();
    done_changed_.wait(lock, [this] { return done_; });
  }
  return status_;
}

void WorkerStream::OnDone(const grpc::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);  // notified under the lock: the waiter destroys this object
  status_ = FromGrpcStatus(status);
  done_ = true;
  done_changed_.notify_all();
}

}  // namespace nibble
