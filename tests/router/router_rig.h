// A router in this process, workers in boxes, clients over loopback.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "nibble/v1/inference.grpc.pb.h"
#include "router/router.h"
#include "tests/router/fake_worker.h"

namespace nibble::testing {

// config.json and tokenizer.json alone: the first replica decides the checkpoint.
inline std::string ModelDir() {
  static const std::string dir = [] {
    const std::string made = ::testing::TempDir() + "/router_test_model";
    std::filesystem::create_directories(made);
    for (const char* file : {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}) {
      std::filesystem::copy_file(std::string("deploy/models/novelist-17m/") + file, made + "/" + file,
                                 std::filesystem::copy_options::overwrite_existing);
    }
    return made;
  }();
  return dir;
}

inline FakeWorkerOptions Worker(FakeWorkerOptions options = {}) {
  options.quantization = "bf16";
  return options;
}

class RouterTest : public ::testing::Test {
 protected:
  using Group = std::vector<std::unique_ptr<FakeWorker>>;

  void AddReplica(std::vector<FakeWorkerOptions> workers) {
    Group group;
    for (const auto& options : workers) group.push_back(std::make_unique<FakeWorker>(options));
    replicas_.push_back(std::move(group));
  }
  FakeWorker& worker(size_t replica, size_t rank) { return *replicas_[replica][rank]; }

  void StartRouter(std::function<void(RouterConfig*)> adjust = nullptr) {
    RouterConfig config;
    config.model_dir = ModelDir();
    config.listen = "127.0.0.1:0";
    config.metrics_listen = "";
    config.ping_interval_ms = 50;
    config.step_timeout_ms = 60000;  // sanitizers are slow; who tests the timeout sets it
    for (const Group& group : replicas_) {
      config.replicas.emplace_back();
      for (const auto& w : group) config.replicas.back().push_back(w->address());
    }
    if (adjust) adjust(&config);
    auto router = Router::Start(config);
    ASSERT_TRUE(router.ok()) << router.status();
    router_ = *std::move(router);
    channel_ = grpc::CreateChannel(router_->address().ToString(), grpc::InsecureChannelCredentials());
    stub_ = v1::Inference::NewStub(channel_);
  }

  v1::GetStatusResponse Status() {
    grpc::ClientContext context;
    v1::GetStatusResponse response;
    const grpc::Status status = stub_->GetStatus(&context, {}, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  // Looks until the predicate holds; fails the test when it does not within a generous time.
  void WaitFor(const char* what, const std::function<bool(const v1::GetStatusResponse&)>& predicate) {
    const auto end = Clock::now() + std::chrono::seconds(60);
    while (Clock::now() < end) {
      if (predicate(Status())) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    FAIL() << what << " did not come: " << Status().DebugString();
  }
  void WaitReady(int count) {
    WaitFor("readiness", [count](const auto& status) {
      int ready = 0;
      for (const auto& replica : status.replicas()) ready += replica.ready() ? 1 : 0;
      return ready == count;
    });
  }
  void WaitIdle() {
    WaitFor("idleness", [](const auto& status) {
      for (const auto& replica : status.replicas()) {
        if (replica.num_requests_running() + replica.num_requests_waiting() > 0) return false;
        if (replica.free_pages() != replica.total_pages()) return false;
      }
      return true;
    });
  }

  static v1::GenerateRequest Request(uint32_t salt, uint32_t max_tokens, uint32_t prompt_tokens = 20) {
    v1::GenerateRequest request;
    for (uint32_t i = 0; i < prompt_tokens; ++i) {
      request.mutable_tokenized()->add_input_ids((salt * 7 + i * i) % kVocabSize);
    }
    auto* params = request.mutable_sampling_params();
    params->set_max_tokens(max_tokens);
    params->set_seed(salt);
    params->set_ignore_eos(true);
    return request;
  }
  static std::vector<uint32_t> Expected(const v1::GenerateRequest& request, uint32_t index = 0) {
    Sequence sequence;
    const auto& ids = request.tokenized().input_ids();
    sequence.token_ids.assign(ids.begin(), ids.end());
    sequence.num_prompt_tokens = static_cast<uint32_t>(ids.size());
    sequence.max_tokens = request.sampling_params().max_tokens();
    sequence.sampling.set_seed(request.sampling_params().seed() + index);
    return ReferenceOutput(sequence).output;
  }

  struct Call {
    v1::GenerateRequest request;
    grpc::ClientContext context;
    std::map<uint32_t, std::vector<uint32_t>> ids;
    std::map<uint32_t, v1::Finish> finishes;
    grpc::Status status;
    std::thread thread;
  };
  // Runs in the background; joined by Wait. `wait_first`: returns once the first message is there.
  std::unique_ptr<Call> Begin(const v1::GenerateRequest& request) {
    auto call = std::make_unique<Call>();
    call->request = request;
    call->thread = std::thread([this, c = call.get()] {
      auto reader = stub_->Generate(&c->context, c->request);
      v1::GenerateResponse response;
      while (reader->Read(&response)) {
        auto& ids = c->ids[response.index()];
        ids.insert(ids.end(), response.token_ids().begin(), response.token_ids().end());
        if (response.has_finish()) c->finishes[response.index()] = response.finish();
      }
      c->status = reader->Finish();
    });
    return call;
  }
  static void Wait(Call* call) { call->thread.join(); }
  static void ExpectExact(const Call& call) {
    ASSERT_TRUE(call.status.ok()) << call.status.error_code() << " " << call.status.error_message();
    const uint32_t n = call.request.sampling_params().has_n() ? call.request.sampling_params().n() : 1;
    for (uint32_t i = 0; i < n; ++i) {
      EXPECT_EQ(call.ids.at(i), Expected(call.request, i)) << "sequence " << i;
      EXPECT_EQ(call.finishes.at(i).usage().completion_tokens(), call.ids.at(i).size());
    }
  }
  void ExpectServes(uint32_t salt) {
    auto call = Begin(Request(salt, 10));
    Wait(call.get());
    ExpectExact(*call);
  }

  // `count` requests at once, all in the middle of their output when `disturb` runs; all must come out exact.
  uint32_t RunDisturbed(int count, uint32_t max_tokens, const std::function<void()>& disturb) {
    std::vector<std::unique_ptr<Call>> calls;
    for (int i = 0; i < count; ++i) calls.push_back(Begin(Request(static_cast<uint32_t>(i), max_tokens)));
    disturb();
    uint32_t replayed = 0;
    for (auto& call : calls) {
      Wait(call.get());
      ExpectExact(*call);
      if (call->status.ok()) replayed += call->finishes.at(0).usage().preemptions() > 0 ? 1 : 0;
    }
    return replayed;
  }

  std::vector<Group> replicas_;
  std::unique_ptr<Router> router_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

}  // namespace nibble::testing
