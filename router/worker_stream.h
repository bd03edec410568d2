// One worker's Execute stream: plans out, results in, both in order.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "nibble/v1/worker.grpc.pb.h"
#include "router/sequence.h"

namespace nibble {

// What a stream reports, on a gRPC thread. Neither call may block.
class WorkerStreamObserver {
 public:
  virtual ~WorkerStreamObserver() = default;
  virtual void OnResult(uint32_t rank, v1::StepResult result) = 0;
  // No more results will come. Once per stream, unless Close came first.
  virtual void OnBroken(uint32_t rank) = 0;
};

// Opened by the constructor; Close before destruction. Send and Close belong to one thread (the replica's).
class WorkerStream : private grpc::ClientBidiReactor<v1::StepPlan, v1::StepResult> {
 public:
  // `stub` and `observer` outlive the stream.
  WorkerStream(v1::Worker::Stub* stub, uint32_t rank, WorkerStreamObserver* observer);
  ~WorkerStream() override;

  WorkerStream(const WorkerStream&) = delete;
  WorkerStream& operator=(const WorkerStream&) = delete;

  // Queues a plan; the queue is as long as the steps in flight. A broken stream swallows it (OnBroken tells).
  void Send(std::shared_ptr<const v1::StepPlan> plan);

  // Ends the stream and waits until gRPC let go of it. Returns how it ended: what the worker said, or CANCELLED.
  absl::Status Close();

 private:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  const uint32_t rank_;
  WorkerStreamObserver* const observer_;
  grpc::ClientContext context_;
  v1::StepResult result_;                                   // being read

  std::mutex mutex_;
  std::deque<std::shared_ptr<const v1::StepPlan>> unsent_;  // front: being written when writing_
  bool writing_ = false;
  bool broken_ = false;
  bool closed_ = false;
  bool done_ = false;
  absl::Status status_;
  std::condition_variable done_changed_;
};

}  // namespace nibble
