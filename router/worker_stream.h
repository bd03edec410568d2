// One worker's Execute stream: plans out, results in, both in order.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "nibble/v1/worker.grpc.pb.h"

namespace nibble {

// What a stream reports, on a gRPC thread. Neither call may block.
class WorkerStreamObserver {
 public:
  virtual ~WorkerStreamObserver() = default;
  virtual void OnResult(uint32_t rank, v1::StepResult result) = 0;
  // No more results will come. Once per stream, unless Close came first. OK: Close will tell why.
  virtual void OnBroken(uint32_t rank, absl::Status why) = 0;
};

// Opened by the constructor; Close before destruction, and after the last Send. Messages are bytes here: the ranks of a
// replica share one serialized plan.
class WorkerStream : private grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  // `observer` outlives the stream.
  WorkerStream(std::shared_ptr<grpc::Channel> channel, uint32_t rank, WorkerStreamObserver* observer);
  ~WorkerStream() override;

  WorkerStream(const WorkerStream&) = delete;
  WorkerStream& operator=(const WorkerStream&) = delete;

  // Queues a serialized StepPlan; the queue is as long as the steps in flight. A broken stream swallows it (OnBroken
  // tells). gRPC frames and writes on the calling thread, which costs it about a system call.
  void Send(const grpc::ByteBuffer& plan);

  // Ends the stream and waits until gRPC let go of it. Returns how it ended: what the worker said, or CANCELLED.
  absl::Status Close();

 private:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  const uint32_t rank_;
  WorkerStreamObserver* const observer_;
  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::ByteBuffer result_;                // being read

  std::mutex mutex_;
  std::deque<grpc::ByteBuffer> unsent_;    // front: being written when writing_
  bool writing_ = false;
  bool broken_ = false;
  bool closed_ = false;
  bool done_ = false;
  absl::Status status_;
  std::condition_variable done_changed_;
};

}  // namespace nibble
