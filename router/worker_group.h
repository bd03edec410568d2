// The workers of one replica as a group: the unary calls that form it and take it apart (worker.proto says the order).
// Every call goes to all ranks at once and blocks the caller, the replica's own thread; Interrupt ends it early.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nibble/v1/worker.grpc.pb.h"

namespace nibble {

// What the group can hold: the smallest over its ranks.
struct GroupCapacity {
  uint32_t num_pages = 0;
  uint32_t page_tokens = 0;
  uint64_t kv_page_bytes = 0;  // summed over ranks
};

class WorkerGroup {
 public:
  // One channel per worker, rank order.
  WorkerGroup(std::vector<std::string> addresses, std::vector<std::shared_ptr<grpc::Channel>> channels);

  uint32_t world_size() const { return static_cast<uint32_t>(addresses_.size()); }
  const std::vector<std::string>& addresses() const { return addresses_; }
  const std::shared_ptr<grpc::Channel>& channel(uint32_t rank) const { return channels_[rank]; }

  // Errors name the worker. The first one cancels the calls that still run.
  absl::StatusOr<std::vector<v1::WorkerInfo>> GetInfo(std::chrono::milliseconds timeout);
  absl::StatusOr<std::vector<std::string>> Prepare(uint64_t epoch, std::chrono::milliseconds timeout);
  absl::StatusOr<GroupCapacity> Join(uint64_t epoch, const std::vector<std::string>& endpoints, uint32_t max_sequences,
                                     uint32_t max_step_tokens, std::chrono::milliseconds timeout);
  // Tells every rank; what they answer does not matter, dead ones included.
  void Abort(uint64_t epoch, const std::string& reason, std::chrono::milliseconds timeout);

  // GetInfo of one rank without waiting; `done` runs on a gRPC thread.
  void Ping(uint32_t rank, std::chrono::milliseconds timeout,
            std::function<void(absl::Status, const v1::WorkerInfo&)> done);

  // From any thread: calls that run now and calls to come end with CANCELLED. Abort is exempt.
  void Interrupt();

 private:
  template <typename Request, typename Response>
  using Method = void (v1::Worker::StubInterface::async_interface::*)(grpc::ClientContext*, const Request*, Response*,
                                                                      std::function<void(grpc::Status)>);
  template <typename Request, typename Response>
  absl::Status CallAll(const char* name, Method<Request, Response> method, const std::vector<Request>& requests,
                       std::vector<Response>* responses, std::chrono::milliseconds timeout, bool stop_at_error);

  const std::vector<std::string> addresses_;
  const std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<std::unique_ptr<v1::Worker::Stub>> stubs_;

  std::mutex mutex_;
  bool interrupted_ = false;
  std::set<grpc::ClientContext*> running_;
};

// Do these workers fit together, to this router, and to the other replicas? FAILED_PRECONDITION names worker, field,
// value and what was expected; UNAVAILABLE a worker that is draining.
struct ExpectedModel {
  std::string fingerprint;    // empty: that of the first replica that forms
  std::string quantization;   // likewise
  uint32_t vocab_size = 0;    // 0: likewise
};

// Shared by all replicas: a sequence may be replayed on any of them, bit by bit.
class ModelAgreement {
 public:
  explicit ModelAgreement(ExpectedModel expected) : expected_(std::move(expected)) {}
  absl::Status Check(const std::vector<std::string>& addresses, const std::vector<v1::WorkerInfo>& infos);

 private:
  std::mutex mutex_;
  ExpectedModel expected_;
};

}  // namespace nibble
