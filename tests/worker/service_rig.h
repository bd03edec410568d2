// The worker's service over a real gRPC loopback channel, with the mock backend and with one that misbehaves on demand:
// what service_*test.cc share.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "worker/membership.h"
#include "worker/mock_engine.h"
#include "worker/service.h"

namespace nibble {

using std::chrono::milliseconds;
using std::chrono::seconds;

inline v1::ModelInfo TestModel() {
  v1::ModelInfo model;
  model.set_name("test");
  model.set_vocab_size(1000);
  model.set_num_layers(2);
  model.set_num_kv_heads(4);
  model.set_max_context_length(4096);
  return model;
}

// A gate that tests open by hand.
class Gate {
 public:
  void Open() {
    {
      std::lock_guard lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    waiting_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void WaitForSomebody() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  bool waiting_ = false;
};

// The mock, with a load that waits, an engine that waits inside a collective until Abort, or steps that fail.
class FaultyBackend : public Backend {
 public:
  // From now on Load, or Connect, waits for the gate that is returned. Under a lock, because ThreadSanitizer does not
  // see how gRPC orders a test and the calls it makes.
  std::shared_ptr<Gate> GateLoads() { return Set(&load_gate_, std::make_shared<Gate>()); }
  std::shared_ptr<Gate> GateConnects() { return Set(&connect_gate_, std::make_shared<Gate>()); }
  void UngateConnects() { Set(&connect_gate_, nullptr); }

  std::atomic<bool> hang{false};  // Execute waits until the communicator is aborted
  std::atomic<int> fail_code{0};  // Execute returns this code
  std::atomic<int> engines{0};    // alive
  std::atomic<int> max_engines{0};
  std::atomic<int> executing{0};

  std::string name() const override { return "mock"; }
  std::string device() const override { return "faulty"; }
  v1::ModelInfo model() const override { return TestModel(); }
  absl::StatusOr<std::shared_ptr<Shard>> Load(int rank, int world_size) override {
    if (const auto gate = Get(load_gate_)) gate->Wait();
    auto shard = inner_->Load(rank, world_size);
    return std::make_shared<FaultyShard>(this, *shard);
  }
  absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(int rank, int world_size) override {
    return std::make_unique<PendingFaultyCommunicator>(*inner_->PrepareCommunicator(rank, world_size),
                                                       Get(connect_gate_));
  }

 private:
  struct FaultyCommunicator : Communicator {
    Gate aborted;
    int rank() const override { return 0; }
    int size() const override { return 1; }
    absl::Status AllReduceSum(const Rows&) override { return absl::OkStatus(); }
    absl::Status AllGather(const void*, int64_t, size_t, void*) override { return absl::OkStatus(); }
    void Abort(std::string_view) override { aborted.Open(); }
  };
  struct PendingFaultyCommunicator : PendingCommunicator {
    PendingFaultyCommunicator(std::unique_ptr<PendingCommunicator> pending, std::shared_ptr<Gate> wait)
        : inner(std::move(pending)), gate(std::move(wait)) {}
    std::string endpoint() const override { return inner->endpoint(); }
    absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::span<const std::string> endpoints) override {
      if (gate != nullptr) gate->Wait();
      if (auto connected = inner->Connect(endpoints); !connected.ok()) return connected.status();
      return std::make_unique<FaultyCommunicator>();
    }
    std::unique_ptr<PendingCommunicator> inner;
    std::shared_ptr<Gate> gate;
  };
  struct FaultyEngine : Engine {
    FaultyEngine(FaultyBackend* owner, std::shared_ptr<Communicator> c, std::unique_ptr<Engine> e)
        : backend(owner), communicator(std::move(c)), inner(std::move(e)) {
      const int alive = ++backend->engines;
      if (alive > backend->max_engines) backend->max_engines = alive;
    }
    ~FaultyEngine() override { --backend->engines; }
    int64_t num_pages() const override { return inner->num_pages(); }
    int64_t kv_page_bytes() const override { return inner->kv_page_bytes(); }
    void Reset() override { inner->Reset(); }
    absl::Status Execute(const v1::StepPlan& plan, v1::StepResult* result) override {
      ++backend->executing;
      if (backend->hang) {
        static_cast<FaultyCommunicator*>(communicator.get())->aborted.Wait();
        return absl::CancelledError("aborted inside a collective");
      }
      if (backend->fail_code != 0) {
        return absl::Status(static_cast<absl::StatusCode>(backend->fail_code.load()), "rank 1 closed the connection");
      }
      return inner->Execute(plan, result);
    }
    FaultyBackend* backend;
    std::shared_ptr<Communicator> communicator;
    std::unique_ptr<Engine> inner;
  };
  struct FaultyShard : Shard {
    FaultyShard(FaultyBackend* owner, std::shared_ptr<Shard> shard) : backend(owner), inner(std::move(shard)) {}
    absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<Communicator> communicator,
                                                         const EngineLimits& limits) override {
      auto engine = inner->CreateEngine(communicator, limits);
      if (!engine.ok()) return engine.status();
      return std::make_unique<FaultyEngine>(backend, std::move(communicator), *std::move(engine));
    }
    FaultyBackend* backend;
    std::shared_ptr<Shard> inner;
  };

  std::shared_ptr<Gate> Set(std::shared_ptr<Gate>* gate, std::shared_ptr<Gate> value) {
    std::lock_guard lock(gates_mutex_);
    return *gate = std::move(value);
  }
  std::shared_ptr<Gate> Get(const std::shared_ptr<Gate>& gate) {
    std::lock_guard lock(gates_mutex_);
    return gate;
  }

  std::unique_ptr<Backend> inner_ = MakeMockBackend({.model = TestModel(), .head_dim = 64});
  std::mutex gates_mutex_;
  std::shared_ptr<Gate> load_gate_;
  std::shared_ptr<Gate> connect_gate_;
};

using PlanStream = grpc::ClientReaderWriter<v1::StepPlan, v1::StepResult>;

struct ClientStream {
  grpc::ClientContext context;
  std::unique_ptr<PlanStream> stream;
};

class ServiceTest : public testing::Test {
 protected:
  void SetUp() override { Start(); }
  void TearDown() override { Stop(); }

  void Start() {
    metrics_ = std::make_unique<WorkerMetrics>(&registry_);
    membership_ = std::make_unique<Membership>(&backend_, metrics_.get(), int64_t{64} << 20);
    service_ = std::make_unique<WorkerService>(membership_.get());
    RpcServerOptions options;
    options.listen = "127.0.0.1:0";
    grpc::Service* services[] = {service_.get()};
    auto server = RpcServer::Start(options, services);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = v1::Worker::NewStub(*CreateChannel(server_->address().ToString()));
  }
  void Stop() {
    server_.reset();
    membership_.reset();
  }

  static void SetDeadline(grpc::ClientContext& context, milliseconds timeout = seconds(30)) {
    context.set_deadline(std::chrono::system_clock::now() + timeout);
    context.set_wait_for_ready(true);  // on a loaded machine the first connection may take more than one attempt
  }
  absl::StatusOr<v1::WorkerInfo> GetInfo(uint32_t version = v1::PROTOCOL_VERSION_CURRENT) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::GetInfoRequest request;
    request.set_protocol_version(version);
    v1::WorkerInfo info;
    const absl::Status status = FromGrpcStatus(stub_->GetInfo(&context, request, &info));
    if (!status.ok()) return status;
    return info;
  }
  absl::StatusOr<std::string> Prepare(uint64_t epoch, uint32_t rank = 0, uint32_t world = 1,
                                      milliseconds timeout = seconds(30)) {
    grpc::ClientContext context;
    SetDeadline(context, timeout);
    v1::PrepareRequest request;
    request.set_epoch(epoch);
    request.set_rank(rank);
    request.set_world_size(world);
    v1::PrepareResponse response;
    const absl::Status status = FromGrpcStatus(stub_->Prepare(&context, request, &response));
    if (!status.ok()) return status;
    return response.endpoint();
  }
  absl::StatusOr<v1::JoinResponse> Join(uint64_t epoch, const std::vector<std::string>& endpoints = {"mock:0/1"},
                                        uint32_t max_sequences = 8, uint32_t max_step_tokens = 512) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::JoinRequest request;
    request.set_epoch(epoch);
    for (const auto& e : endpoints) request.add_endpoints(e);
    request.set_max_sequences(max_sequences);
    request.set_max_step_tokens(max_step_tokens);
    v1::JoinResponse response;
    const absl::Status status = FromGrpcStatus(stub_->Join(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  void Abort(uint64_t epoch, const std::string& reason) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::AbortRequest request;
    request.set_epoch(epoch);
    request.set_reason(reason);
    v1::AbortResponse response;
    EXPECT_TRUE(stub_->Abort(&context, request, &response).ok());
  }
  void Form(uint64_t epoch) {
    ASSERT_TRUE(Prepare(epoch).ok());
    ASSERT_TRUE(Join(epoch).ok());
  }
  std::unique_ptr<ClientStream> Execute() {
    auto client = std::make_unique<ClientStream>();
    SetDeadline(client->context);
    client->stream = stub_->Execute(&client->context);
    return client;
  }
  static absl::Status FinishOf(ClientStream& client) {
    v1::StepResult result;
    while (client.stream->Read(&result)) {
    }
    return FromGrpcStatus(client.stream->Finish());
  }

  FaultyBackend backend_;
  MetricRegistry registry_;
  std::unique_ptr<WorkerMetrics> metrics_;
  std::unique_ptr<Membership> membership_;
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<v1::Worker::Stub> stub_;
};

// Starts slot 0 with `tokens` prompt tokens, prefills them all and samples.
inline v1::StepPlan FirstPlan(uint64_t epoch, uint64_t step = 1, uint32_t slot = 0, int tokens = 10) {
  v1::StepPlan plan;
  plan.set_epoch(epoch);
  plan.set_step(step);
  auto* start = plan.add_start();
  start->set_slot(slot);
  for (int i = 0; i < tokens; ++i) start->add_token_ids(static_cast<uint32_t>(i));
  start->set_num_prompt_tokens(static_cast<uint32_t>(tokens));
  start->add_page_ids(0);
  start->mutable_sampling()->set_top_p(1);
  auto* chunk = plan.add_prefill();
  chunk->set_slot(slot);
  chunk->set_num_tokens(static_cast<uint32_t>(tokens));
  chunk->set_sample(true);
  return plan;
}

inline v1::StepPlan DecodePlan(uint64_t step, uint32_t slot = 0) {
  v1::StepPlan plan;
  plan.set_step(step);
  plan.add_decode_slots(slot);
  return plan;
}

}  // namespace nibble
