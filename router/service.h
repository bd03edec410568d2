// The client API on gRPC's callback threads: every call becomes a request to Intake and Fleet, and an answer. No policy.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "common/base/bounded_queue.h"
#include "nibble/v1/inference.grpc.pb.h"
#include "router/fleet.h"
#include "router/intake.h"
#include "router/output_pool.h"
#include "router/request_metrics.h"

namespace nibble {

struct ServiceOptions {
  v1::GetModelInfoResponse model_info;
  uint32_t tokenizer_threads = 2;
  uint32_t max_buffered_tokens = 4096;
  std::chrono::milliseconds stall_timeout{60000};
};

// Generate and Tokenize take bytes and parse them here: gRPC answers what protobuf refuses (a string that is not UTF-8)
// with UNIMPLEMENTED and no word about why.
using InferenceServiceBase = v1::Inference::WithRawCallbackMethod_Generate<v1::Inference::WithRawCallbackMethod_Tokenize<
    v1::Inference::WithCallbackMethod_Detokenize<v1::Inference::WithCallbackMethod_GetModelInfo<
        v1::Inference::WithCallbackMethod_GetStatus<v1::Inference::Service>>>>>;

class InferenceService : public InferenceServiceBase {
 public:
  // Everything outlives the service.
  InferenceService(const ServiceOptions& options, const Tokenizer* tokenizer, const Intake* intake, Fleet* fleet,
                   OutputPool* output, RequestMetrics* metrics);
  // No call may be running: the server is shut down before.
  ~InferenceService() override;

  // From now on Generate is UNAVAILABLE; what runs goes on.
  void Drain();
  // Waits until no Generate runs. False: some still do when the time is over.
  bool WaitIdle(std::chrono::milliseconds timeout);
  // Ends every Generate that still runs.
  void FailAll(const absl::Status& status);

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest* request,
                                         v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;

 private:
  class GenerateCall;

  void Start(std::shared_ptr<const v1::GenerateRequest> request, const std::shared_ptr<OutputStream>& stream,
             TimePoint deadline);
  // Encodes, admits and submits; whatever is wrong ends the stream.
  void Begin(const v1::GenerateRequest& request, const std::shared_ptr<OutputStream>& stream, TimePoint arrived_at,
             TimePoint deadline);
  // Runs on a tokenizer thread. False: their queue is full.
  bool RunOnPool(std::function<void()> task);
  void PoolThread();

  const ServiceOptions options_;
  const Tokenizer* const tokenizer_;
  const Intake* const intake_;
  Fleet* const fleet_;
  OutputPool* const output_;
  RequestMetrics* const metrics_;
  const TimePoint started_at_ = Clock::now();

  std::atomic<uint64_t> next_sequence_id_ = kMaxSequencesPerRequest;
  std::mutex mutex_;                                 // below
  std::condition_variable idle_;
  bool draining_ = false;
  std::unordered_set<GenerateCall*> calls_;

  BoundedQueue<std::function<void()>> pool_queue_;
  std::vector<std::thread> pool_;
};

}  // namespace nibble
