// An in-process Inference service for tests of the clients: answers at once, records what it was asked.
//   Prompt "refuse"    INVALID_ARGUMENT with a field violation
//   Prompt "overload"  RESOURCE_EXHAUSTED, try again in 0.5 s
//   Prompt "hang"      three tokens, then nothing until the client cancels or its deadline passes
//   Prompt "cut"       three tokens, then OK without finish
//   Prompt "escape"    text with an escape sequence
//   everything else    max_tokens tokens 100, 101, ... as "w0 w1 ...", n sequences in turn
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "nibble/v1/inference.grpc.pb.h"

namespace nibble::testing {

class FakeInference : public v1::Inference::CallbackService {
 public:
  FakeInference();            // listens on a free port of 127.0.0.1
  ~FakeInference() override;  // cancels what runs

  const std::string& address() const { return address_; }
  std::unique_ptr<v1::Inference::Stub> NewStub() const;

  // Before the first call.
  v1::GetModelInfoResponse model;
  int status_calls_until_ready = 0;
  int fail_every = 0;  // every k-th Generate call is UNAVAILABLE; 0 = none

  v1::GenerateRequest last_request() const;
  int64_t generate_calls() const { return generate_calls_; }
  int64_t cancelled_calls() const { return cancelled_calls_; }
  size_t distinct_prompts() const;  // tokenized prompts
  size_t connections() const;       // client sockets that called Generate

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest* request,
                                         v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;

 private:
  friend class FakeGeneration;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  mutable std::mutex mutex_;
  v1::GenerateRequest last_request_;
  std::map<std::string, int> prompts_;
  std::map<std::string, int> peers_;
  std::atomic<int64_t> generate_calls_ = 0;
  std::atomic<int64_t> cancelled_calls_ = 0;
  std::atomic<int> status_calls_ = 0;
};

}  // namespace nibble::testing
