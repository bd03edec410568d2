// The worker's service over a real gRPC loopback channel, with the mock backend and with one that misbehaves on demand.
#include "worker/service.h"

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

namespace nibble {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

v1::ModelInfo TestModel() {
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
v1::StepPlan FirstPlan(uint64_t epoch, uint64_t step = 1, uint32_t slot = 0, int tokens = 10) {
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

v1::StepPlan DecodePlan(uint64_t step, uint32_t slot = 0) {
  v1::StepPlan plan;
  plan.set_step(step);
  plan.add_decode_slots(slot);
  return plan;
}

TEST_F(ServiceTest, GetInfoTellsWhoItIs) {
  const auto info = GetInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->protocol_version(), v1::PROTOCOL_VERSION_CURRENT);
  EXPECT_EQ(info->backend(), "mock");
  EXPECT_EQ(info->model().vocab_size(), 1000u);
  EXPECT_NE(info->instance(), 0u);
  EXPECT_FALSE(info->draining());
  Stop();
  Start();
  EXPECT_NE(GetInfo()->instance(), info->instance()) << "a restarted worker is another instance";
}

TEST_F(ServiceTest, ProtocolMismatchNamesBothVersions) {
  const absl::Status status = GetInfo(77).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("protocol_version is 77"), std::string::npos) << status;
  EXPECT_NE(status.message().find("speaks 1"), std::string::npos) << status;
  EXPECT_EQ(GetInfo(0).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ServiceTest, OneLife) {
  const auto endpoint = Prepare(1);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const auto capacity = Join(1, {*endpoint});
  ASSERT_TRUE(capacity.ok()) << capacity.status();
  EXPECT_EQ(capacity->page_tokens(), 64u);
  EXPECT_GT(capacity->num_pages(), 0u);
  EXPECT_EQ(capacity->num_pages(), (uint64_t{64} << 20) / capacity->kv_page_bytes());

  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  for (uint64_t step = 2; step <= 10; ++step) ASSERT_TRUE(client->stream->Write(DecodePlan(step)));
  for (uint64_t step = 1; step <= 10; ++step) {
    v1::StepResult result;
    ASSERT_TRUE(client->stream->Read(&result));
    EXPECT_EQ(result.step(), step);
    ASSERT_EQ(result.token_ids_size(), 1);
    EXPECT_LT(result.token_ids(0), 1000u);
  }
  EXPECT_EQ(metrics_->sequences.Value(), 1);
  client->stream->WritesDone();
  EXPECT_TRUE(FinishOf(*client).ok());
  EXPECT_EQ(metrics_->sequences.Value(), 0);
  EXPECT_EQ(metrics_->steps.Value(), 10);
  EXPECT_EQ(metrics_->prefill_rows.Value(), 10);
  EXPECT_EQ(metrics_->decode_rows.Value(), 9);

  // A new stream starts from nothing: the slot is free again, and the same plan gives the same token.
  auto again = Execute();
  ASSERT_TRUE(again->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  EXPECT_TRUE(again->stream->Read(&result));
}

TEST_F(ServiceTest, ManyStepsWithRunAheadStayInOrder) {
  Form(1);
  auto client = Execute();
  v1::StepPlan first = FirstPlan(1);
  for (uint32_t page = 1; page < 40; ++page) first.mutable_start(0)->add_page_ids(page);
  ASSERT_TRUE(client->stream->Write(first));
  uint64_t sent = 1;
  for (uint64_t step = 1; step <= 2000; ++step) {
    while (sent < step + 2) ASSERT_TRUE(client->stream->Write(DecodePlan(++sent)));
    v1::StepResult result;
    ASSERT_TRUE(client->stream->Read(&result)) << FinishOf(*client);
    ASSERT_EQ(result.step(), step);
  }
  client->stream->WritesDone();
  EXPECT_TRUE(FinishOf(*client).ok());
}

TEST_F(ServiceTest, RankAndSizeAreChecked) {
  EXPECT_EQ(Prepare(1, 0, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Prepare(1, 2, 2).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Prepare(1, 0, UINT32_MAX).status().code(), absl::StatusCode::kInvalidArgument);
  const absl::Status status = Prepare(1, 0, 3).status();
  EXPECT_NE(status.message().find("must divide the model's 4 KV heads"), std::string::npos) << status;
  EXPECT_TRUE(Prepare(1, 3, 4).ok()) << "a refused Prepare uses no epoch up";
}

TEST_F(ServiceTest, JoinIsChecked) {
  EXPECT_EQ(Join(1).status().code(), absl::StatusCode::kFailedPrecondition) << "before Prepare";
  ASSERT_TRUE(Prepare(5).ok());
  const absl::Status wrong_epoch = Join(4).status();
  EXPECT_EQ(wrong_epoch.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(wrong_epoch.message().find("epoch is 4, the current one is 5"), std::string::npos) << wrong_epoch;
  EXPECT_EQ(Join(5, {"mock:0/1"}, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Join(5, {"mock:0/1"}, UINT32_MAX).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Join(5, {"mock:0/1"}, 8, UINT32_MAX).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Join(5, {}).status().code(), absl::StatusCode::kInvalidArgument) << "endpoints missing";
  // Meeting the others failed, so the group is over.
  EXPECT_FALSE(Join(5).ok());
  ASSERT_TRUE(Prepare(6).ok());
  EXPECT_TRUE(Join(6).ok());
  const absl::Status twice = Join(6).status();
  EXPECT_EQ(twice.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(twice.message().find("serving"), std::string::npos) << twice;
}

TEST_F(ServiceTest, StaleEpochsAreRefusedWithNumbers) {
  Form(10);
  for (const uint64_t epoch : {uint64_t{0}, uint64_t{9}, uint64_t{10}}) {
    const absl::Status status = Prepare(epoch).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(status.message().find("must be above 10"), std::string::npos) << status;
  }
  auto stale = Execute();
  stale->stream->Write(FirstPlan(9));
  const absl::Status status = FinishOf(*stale);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("epoch is 9, the current one is 10"), std::string::npos) << status;
  Abort(9, "stale");
  auto client = Execute();
  client->stream->Write(FirstPlan(10));
  v1::StepResult result;
  EXPECT_TRUE(client->stream->Read(&result)) << "the group of epoch 10 is untouched";
}

TEST_F(ServiceTest, ALargerEpochTakesOver) {
  Form(1);
  auto old = Execute();
  ASSERT_TRUE(old->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(old->stream->Read(&result));
  Form(2);
  const absl::Status status = FinishOf(*old);
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_NE(status.message().find("epoch 2 took over"), std::string::npos) << status;
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(2)));
  EXPECT_TRUE(client->stream->Read(&result));
  EXPECT_EQ(backend_.max_engines, 1) << "the old pool is freed before the new one is made";
}

TEST_F(ServiceTest, ExecuteNeedsAJoinedGroup) {
  ASSERT_TRUE(Prepare(1).ok());
  auto client = Execute();
  client->stream->Write(FirstPlan(1));
  const absl::Status status = FinishOf(*client);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("must be joined"), std::string::npos) << status;
}

TEST_F(ServiceTest, AStreamWithoutPlansEndsWell) {
  auto client = Execute();
  client->stream->WritesDone();
  EXPECT_TRUE(FinishOf(*client).ok());
}

TEST_F(ServiceTest, TheNewestStreamWins) {
  Form(1);
  auto first = Execute();
  ASSERT_TRUE(first->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(first->stream->Read(&result));
  auto second = Execute();
  ASSERT_TRUE(second->stream->Write(FirstPlan(1)));
  ASSERT_TRUE(second->stream->Read(&result));
  const absl::Status status = FinishOf(*first);
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  ASSERT_TRUE(second->stream->Write(DecodePlan(2)));
  EXPECT_TRUE(second->stream->Read(&result));
}

TEST_F(ServiceTest, BadPlansEndTheirStreamAndNothingElse) {
  Form(1);
  struct Case {
    const char* name;
    std::function<void(v1::StepPlan&)> spoil;
  };
  const Case cases[] = {
      {"release_slots", [](auto& p) { p.add_release_slots(3); }},
      {"release_slots", [](auto& p) { p.add_release_slots(UINT32_MAX); }},
      {"start.slot", [](auto& p) { p.mutable_start(0)->set_slot(8); }},
      {"start.slot", [](auto& p) { *p.add_start() = p.start(0); }},
      {"start.token_ids", [](auto& p) { p.mutable_start(0)->add_token_ids(1000); }},
      {"start.token_ids", [](auto& p) { p.mutable_start(0)->clear_token_ids(); }},
      {"start.num_prompt_tokens", [](auto& p) { p.mutable_start(0)->set_num_prompt_tokens(11); }},
      {"start.num_cached_tokens", [](auto& p) { p.mutable_start(0)->set_num_cached_tokens(64); }},
      {"start.page_ids", [](auto& p) { p.mutable_start(0)->add_page_ids(UINT32_MAX); }},
      {"page_slots", [](auto& p) { p.add_page_slots(0); }},
      {"page_slots",
       [](auto& p) {
         p.add_page_slots(7);
         p.add_page_ids(1);
       }},
      {"page_ids",
       [](auto& p) {
         p.add_page_slots(0);
         p.add_page_ids(UINT32_MAX);
       }},
      {"prefill", [](auto& p) { p.mutable_prefill(0)->set_num_tokens(11); }},
      {"prefill", [](auto& p) { p.mutable_prefill(0)->set_num_tokens(0); }},
      {"prefill", [](auto& p) { p.mutable_prefill(0)->set_num_tokens(9); }},
      {"prefill", [](auto& p) { p.mutable_start(0)->clear_page_ids(); }},
      {"rows", [](auto& p) { p.mutable_prefill(0)->set_num_tokens(UINT32_MAX); }},
      {"decode_slots", [](auto& p) { p.add_decode_slots(5); }},
  };
  for (const Case& c : cases) {
    auto client = Execute();
    v1::StepPlan plan = FirstPlan(1);
    c.spoil(plan);
    ASSERT_TRUE(client->stream->Write(plan));
    const absl::Status status = FinishOf(*client);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.name << ": " << status;
    EXPECT_NE(status.message().find(c.name), std::string::npos) << status;
  }
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  EXPECT_TRUE(client->stream->Read(&result));
  EXPECT_EQ(result.token_ids_size(), 1);
}

TEST_F(ServiceTest, RandomPlansNeverCrash) {
  Form(1);
  std::mt19937 random(7);
  const auto any = [&]() -> uint32_t {
    switch (random() % 4) {
      case 0:
        return random() % 4;
      case 1:
        return random() % 70;
      case 2:
        return UINT32_MAX - random() % 3;
      default:
        return random();
    }
  };
  int executed = 0;
  for (int round = 0; round < 200; ++round) {
    auto client = Execute();
    for (int step = 0; step < 5; ++step) {
      if (step == 0 && random() % 2) {
        client->stream->Write(FirstPlan(1));
        continue;
      }
      v1::StepPlan plan;
      plan.set_epoch(1);
      plan.set_step(any());
      for (uint32_t i = random() % 3; i > 0; --i) plan.add_release_slots(any());
      for (uint32_t i = random() % 3; i > 0; --i) plan.add_page_slots(any());
      for (uint32_t i = random() % 3; i > 0; --i) plan.add_page_ids(any());
      for (uint32_t i = random() % 3; i > 0; --i) plan.add_decode_slots(any());
      if (random() % 3 == 0) {
        auto* start = plan.add_start();
        start->set_slot(any());
        for (uint32_t i = random() % 80; i > 0; --i) start->add_token_ids(any() % 1100);
        start->set_num_prompt_tokens(any());
        start->set_num_cached_tokens(any());
        for (uint32_t i = random() % 3; i > 0; --i) start->add_page_ids(any());
        start->mutable_sampling()->set_num_top_logprobs(any());
        start->mutable_sampling()->set_logprobs(random() % 2);
        start->mutable_sampling()->set_prompt_logprobs(random() % 2);
      }
      auto* chunk = plan.add_prefill();
      chunk->set_slot(any());
      chunk->set_num_tokens(any());
      chunk->set_sample(random() % 2);
      if (random() % 2) plan.clear_prefill();
      if (!client->stream->Write(plan)) break;
    }
    client->stream->WritesDone();
    v1::StepResult result;
    while (client->stream->Read(&result)) ++executed;
    const absl::Status status = FromGrpcStatus(client->stream->Finish());
    EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
  }
  EXPECT_GT(executed, 0) << "some of them are legal";
  EXPECT_TRUE(GetInfo().ok());
}

TEST_F(ServiceTest, AbortEndsAHungStepAtOnce) {
  backend_.hang = true;
  Form(1);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  while (backend_.executing == 0) std::this_thread::yield();
  Abort(2, "an epoch nobody knows");
  Abort(1, "rank 1 is gone");
  Abort(1, "again");
  const absl::Status status = FinishOf(*client);
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_NE(status.message().find("rank 1 is gone"), std::string::npos) << status;
  backend_.hang = false;
  auto late = Execute();
  late->stream->Write(FirstPlan(1));
  EXPECT_EQ(FinishOf(*late).code(), absl::StatusCode::kFailedPrecondition);
  Form(3);
  auto healthy = Execute();
  ASSERT_TRUE(healthy->stream->Write(FirstPlan(3)));
  v1::StepResult result;
  EXPECT_TRUE(healthy->stream->Read(&result));
}

TEST_F(ServiceTest, ALostPeerEndsTheGroup) {
  Form(1);
  backend_.fail_code = static_cast<int>(absl::StatusCode::kUnavailable);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  const absl::Status status = FinishOf(*client);
  EXPECT_EQ(status, absl::UnavailableError("rank 1 closed the connection"));
  backend_.fail_code = 0;
  auto late = Execute();
  late->stream->Write(FirstPlan(1));
  const absl::Status refused = FinishOf(*late);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_NE(refused.message().find("prepare a larger one"), std::string::npos) << refused;
  Form(2);
}

TEST_F(ServiceTest, ASlowLoadBlocksNothingElse) {
  const auto gate = backend_.GateLoads();
  auto first = std::async(std::launch::async, [&] { return Prepare(1).status(); });
  gate->WaitForSomebody();
  EXPECT_TRUE(GetInfo().ok());
  EXPECT_EQ(Join(1).status().code(), absl::StatusCode::kFailedPrecondition);
  // A newer epoch ends the old Prepare at once, though its load goes on.
  auto second = std::async(std::launch::async, [&] { return Prepare(2).status(); });
  EXPECT_EQ(first.get().code(), absl::StatusCode::kAborted);
  gate->Open();
  EXPECT_TRUE(second.get().ok());
  EXPECT_TRUE(Join(2).ok());
}

TEST_F(ServiceTest, APeerThatNeverComesDoesNotHoldUpTheNextGroup) {
  const auto never = backend_.GateConnects();
  ASSERT_TRUE(Prepare(1).ok());
  backend_.UngateConnects();  // the first group keeps its own
  auto first = std::async(std::launch::async, [&] { return Join(1).status(); });
  never->WaitForSomebody();
  Form(2);
  EXPECT_EQ(first.get().code(), absl::StatusCode::kAborted);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(2)));
  v1::StepResult result;
  EXPECT_TRUE(client->stream->Read(&result));
  never->Open();
}

TEST_F(ServiceTest, AnImpatientCallerLeavesALoadBehind) {
  const auto gate = backend_.GateLoads();
  EXPECT_EQ(Prepare(1, 0, 1, milliseconds(50)).status().code(), absl::StatusCode::kDeadlineExceeded);
  server_->Shutdown(milliseconds(0));  // does not wait for the load
  gate->Open();
}

TEST_F(ServiceTest, AFloodOfEpochsIsBounded) {
  const auto gate = backend_.GateLoads();
  std::vector<std::future<absl::Status>> calls;
  for (uint64_t epoch = 1; epoch <= 12; ++epoch) {
    calls.push_back(std::async(std::launch::async, [this, epoch] { return Prepare(epoch).status(); }));
  }
  int refused = 0;
  for (auto& call : calls) {
    if (call.wait_for(seconds(10)) != std::future_status::ready) continue;  // the one that still loads
    const absl::Status status = call.get();
    refused +=
        status.code() == absl::StatusCode::kResourceExhausted || status.code() == absl::StatusCode::kFailedPrecondition;
    EXPECT_FALSE(status.ok());
    if (refused > 0) break;
  }
  gate->Open();
  for (auto& call : calls) {
    if (call.valid()) call.wait();
  }
  EXPECT_TRUE(Prepare(100).ok());
}

TEST_F(ServiceTest, QueuedPlansAreBounded) {
  backend_.hang = true;
  Form(1);
  auto client = Execute();
  client->stream->Write(FirstPlan(1));
  for (uint64_t step = 2; step < 100; ++step) {
    if (!client->stream->Write(DecodePlan(step))) break;
  }
  const absl::Status status = FinishOf(*client);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("the limit is 16"), std::string::npos) << status;
  Abort(1, "end of test");
}

TEST_F(ServiceTest, ACancelledStreamDropsItsSequences) {
  Form(1);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(client->stream->Read(&result));
  client->context.TryCancel();
  EXPECT_EQ(FinishOf(*client).code(), absl::StatusCode::kCancelled);
  while (metrics_->sequences.Value() != 0) std::this_thread::yield();
  auto next = Execute();
  ASSERT_TRUE(next->stream->Write(FirstPlan(1)));
  EXPECT_TRUE(next->stream->Read(&result));
}

TEST_F(ServiceTest, DrainWaitsForSequencesThenEndsTheStream) {
  Form(1);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(client->stream->Read(&result));
  auto drained = std::async(std::launch::async, [&] { return membership_->Drain(seconds(30)); });
  while (!GetInfo()->draining()) std::this_thread::yield();
  EXPECT_EQ(Prepare(2).status(), absl::UnavailableError("the worker is draining"));
  ASSERT_TRUE(client->stream->Write(DecodePlan(2))) << "what runs goes on";
  ASSERT_TRUE(client->stream->Read(&result));
  v1::StepPlan last;
  last.set_step(3);
  last.add_release_slots(0);
  ASSERT_TRUE(client->stream->Write(last));
  EXPECT_TRUE(drained.get());
  EXPECT_EQ(FinishOf(*client), absl::UnavailableError("the worker is draining"));
}

TEST_F(ServiceTest, DrainGivesUpAtItsDeadline) {
  Form(1);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(client->stream->Read(&result));
  EXPECT_FALSE(membership_->Drain(milliseconds(30)));
  EXPECT_EQ(FinishOf(*client).code(), absl::StatusCode::kUnavailable);
}

TEST_F(ServiceTest, TheServerStopsUnderAnOpenStream) {
  Form(1);
  auto client = Execute();
  ASSERT_TRUE(client->stream->Write(FirstPlan(1)));
  v1::StepResult result;
  ASSERT_TRUE(client->stream->Read(&result));
  server_->Shutdown(milliseconds(0));
  EXPECT_FALSE(FinishOf(*client).ok());
}

}  // namespace
}  // namespace nibble
