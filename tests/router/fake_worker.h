// A worker process in a box: the Worker service on a port of its own, computing with a ModelWorker, and misbehaving on
// request. What the router's edge is tested against.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "nibble/v1/worker.grpc.pb.h"
#include "tests/router/model_worker.h"

namespace nibble::testing {

struct FakeWorkerOptions {
  int port = 0;                          // 0: any; a restart asks for the one it had
  uint64_t instance = 1;
  uint32_t protocol_version = v1::PROTOCOL_VERSION_CURRENT;
  std::string fingerprint = "f00d";
  std::string quantization = "w4a4kv4";
  uint32_t vocab_size = 4096;
  uint32_t num_pages = 64;
  uint32_t page_tokens = 64;
};

class FakeWorker final : public v1::Worker::Service {
 public:
  explicit FakeWorker(const FakeWorkerOptions& options);
  ~FakeWorker() override;                // as if killed: every call ends at once

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  int port() const { return port_; }

  // Misbehaviour, from the next plan on.
  void HangAtStep(uint64_t step);        // never answers that step
  void BreakAtStep(uint64_t step);       // ends the stream with INTERNAL instead of answering
  void LieAtStep(uint64_t step);         // answers with another step's number
  void Drain();                          // says so in GetInfo
  // While held, steps after `step` wait; Release lets them go.
  void HoldAfterStep(uint64_t step);
  void Release();

  // Blocks until this many steps of the current stream were answered; ends the test when they never are.
  void WaitForSteps(uint64_t steps);
  uint64_t prepares();
  uint64_t aborts();
  uint64_t last_epoch();
  uint32_t live_slots();                 // of the stream that ran last

 private:
  grpc::Status GetInfo(grpc::ServerContext*, const v1::GetInfoRequest*, v1::WorkerInfo*) override;
  grpc::Status Prepare(grpc::ServerContext*, const v1::PrepareRequest*, v1::PrepareResponse*) override;
  grpc::Status Join(grpc::ServerContext*, const v1::JoinRequest*, v1::JoinResponse*) override;
  grpc::Status Execute(grpc::ServerContext*, grpc::ServerReaderWriter<v1::StepResult, v1::StepPlan>*) override;
  grpc::Status Abort(grpc::ServerContext*, const v1::AbortRequest*, v1::AbortResponse*) override;

  const FakeWorkerOptions options_;
  int port_ = 0;

  std::mutex mutex_;                     // below
  std::condition_variable changed_;
  bool stopping_ = false, draining_ = false;
  uint64_t hang_at_ = 0, break_at_ = 0, lie_at_ = 0;  // 0: never
  uint64_t hold_after_ = ~uint64_t{0};
  uint64_t epoch_ = 0, prepares_ = 0, aborts_ = 0, aborted_epoch_ = 0;
  uint64_t steps_ = 0;                   // answered on the current stream
  uint32_t rank_ = 0, live_slots_ = 0;
  v1::JoinRequest join_;

  std::unique_ptr<grpc::Server> server_;
};

}  // namespace nibble::testing
