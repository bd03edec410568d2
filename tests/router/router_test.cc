// The router in this process, workers in boxes, clients over loopback: what happens when things go wrong.
#include "router/router.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/rpc/status.h"
#include "nibble/v1/inference.grpc.pb.h"
#include "tests/router/fake_worker.h"

namespace nibble {
namespace {

using std::chrono::milliseconds, std::chrono::seconds;
using ::testing::HasSubstr;
using testing::FakeWorker;
using testing::FakeWorkerOptions;

// config.json and tokenizer.json alone: the first replica decides the checkpoint.
std::string ModelDir() {
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

FakeWorkerOptions Worker(FakeWorkerOptions options = {}) {
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
    const auto end = Clock::now() + seconds(60);
    while (Clock::now() < end) {
      if (predicate(Status())) return;
      std::this_thread::sleep_for(milliseconds(2));
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
      request.mutable_tokenized()->add_input_ids((salt * 7 + i * i) % testing::kVocabSize);
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
    return testing::ReferenceOutput(sequence).output;
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

TEST_F(RouterTest, GeneratesOnAGroupOfTwo) {
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(3, 100, 300);
  request.mutable_sampling_params()->set_n(4);
  auto call = Begin(request);
  Wait(call.get());
  ExpectExact(*call);
  WaitIdle();
  EXPECT_EQ(worker(0, 0).live_slots(), worker(0, 1).live_slots());
}

TEST_F(RouterTest, RunAheadOffGivesTheSame) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) { c->run_ahead = false; });
  WaitReady(1);
  ExpectServes(5);
}

TEST_F(RouterTest, TextGoesInAndOut) {
  AddReplica({Worker()});
  StartRouter();
  v1::GetModelInfoResponse info;
  v1::TokenizeRequest tokenize;
  v1::TokenizeResponse tokens;
  v1::DetokenizeRequest detokenize;
  v1::DetokenizeResponse text;
  const std::string words(10000, 'a');  // long enough for the pool
  tokenize.set_text("It was — " + words);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.vocab_size(), 4096u);
    EXPECT_EQ(info.max_context_length(), 4096u);
  }
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Tokenize(&context, tokenize, &tokens).ok());
  }
  *detokenize.mutable_input_ids() = tokens.input_ids();
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Detokenize(&context, detokenize, &text).ok());
    EXPECT_EQ(text.text(), tokenize.text());
  }
}

TEST_F(RouterTest, ABrokenStreamIsReplayedElsewhereExactly) {
  AddReplica({Worker(), Worker()});
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(2);
  for (size_t replica : {0, 1}) {
    for (size_t rank : {0, 1}) worker(replica, rank).HoldAfterStep(20);
  }
  const uint32_t replayed = RunDisturbed(24, 200, [&] {
    worker(0, 0).WaitForSteps(20);
    worker(1, 0).WaitForSteps(20);
    worker(0, 1).BreakAtStep(25);
    for (size_t replica : {0, 1}) {
      for (size_t rank : {0, 1}) worker(replica, rank).Release();
    }
  });
  EXPECT_GT(replayed, 0u) << "nothing was disturbed";
  WaitReady(2);  // and it comes back by itself
  EXPECT_GE(worker(0, 0).aborts(), 1u) << "the survivor is told";
}

TEST_F(RouterTest, AKilledWorkerIsReplayedElsewhereExactly) {
  AddReplica({Worker(), Worker()});
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(2);
  for (size_t replica : {0, 1}) worker(replica, 0).HoldAfterStep(30);
  FakeWorkerOptions again = Worker({.port = worker(1, 1).port(), .instance = 2});
  const uint32_t replayed = RunDisturbed(24, 200, [&] {
    worker(0, 0).WaitForSteps(30);
    worker(1, 0).WaitForSteps(30);
    replicas_[1][1].reset();
    for (size_t replica : {0, 1}) worker(replica, 0).Release();
  });
  EXPECT_GT(replayed, 0u);
  replicas_[1][1] = std::make_unique<FakeWorker>(again);
  WaitReady(2);
}

TEST_F(RouterTest, AHangingWorkerTripsTheStepTimeout) {
  AddReplica({Worker(), Worker()});
  AddReplica({Worker(), Worker()});
  StartRouter([](RouterConfig* c) { c->step_timeout_ms = 300; });
  WaitReady(2);
  for (size_t replica : {0, 1}) worker(replica, 1).HoldAfterStep(10);
  const uint32_t replayed = RunDisturbed(16, 100, [&] {
    worker(0, 0).WaitForSteps(10);
    worker(1, 0).WaitForSteps(10);
    worker(0, 1).HangAtStep(15);  // a rank above 0: its tokens are not missed, its answer is
    for (size_t replica : {0, 1}) worker(replica, 1).Release();
  });
  EXPECT_GT(replayed, 0u);
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr("step-timeout-ms"));
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr(worker(0, 1).address()));
}

TEST_F(RouterTest, AWrongAnswerTakesTheReplicaDown) {
  AddReplica({Worker()});
  AddReplica({Worker()});
  StartRouter();
  WaitReady(2);
  worker(0, 0).LieAtStep(12);
  worker(1, 0).HoldAfterStep(10);
  const uint32_t replayed = RunDisturbed(16, 60, [&] {
    WaitReady(1);
    worker(1, 0).Release();
  });
  EXPECT_GT(replayed, 0u);
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr("answered step"));
}

TEST_F(RouterTest, WithoutAnotherReplicaTheErrorIsClearAndServiceComesBack) {
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 1).BreakAtStep(5);
  auto call = Begin(Request(1, 100));
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(call->status.error_message(), HasSubstr("was lost"));
  EXPECT_TRUE(RetryAfter(FromGrpcStatus(call->status)).has_value());
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr("device lost"));
  worker(0, 1).BreakAtStep(0);
  WaitReady(1);
  ExpectServes(2);
}

TEST_F(RouterTest, WithReplayWaitTheClientSeesOnlyAPause) {
  AddReplica({Worker(), Worker()});
  StartRouter([](RouterConfig* c) { c->replay_wait_ms = 20000; });
  WaitReady(1);
  worker(0, 0).HoldAfterStep(8);
  const uint32_t replayed = RunDisturbed(8, 50, [&] {
    worker(0, 0).WaitForSteps(8);
    const FakeWorkerOptions again = Worker({.port = worker(0, 1).port(), .instance = 9});
    replicas_[0][1].reset();
    worker(0, 0).Release();
    replicas_[0][1] = std::make_unique<FakeWorker>(again);
  });
  EXPECT_GT(replayed, 0u);
}

TEST_F(RouterTest, WithReplayWaitARequestMayComeBeforeItsReplica) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) {
    c->replay_wait_ms = 20000;
    c->max_waiting_requests = 1;
  });
  WaitReady(1);
  ExpectServes(1);
  const uint64_t steps = Status().replicas(0).steps();
  const FakeWorkerOptions again = Worker({.port = worker(0, 0).port(), .instance = 9});
  replicas_[0][0].reset();
  WaitReady(0);
  auto call = Begin(Request(2, 10));
  EXPECT_EQ(Status().replicas(0).steps(), steps) << "of all the replica's lives";
  replicas_[0][0] = std::make_unique<FakeWorker>(again);
  Wait(call.get());
  ExpectExact(*call);
  EXPECT_GT(Status().replicas(0).steps(), steps);
}

TEST_F(RouterTest, ARequestThatKillsEveryReplicaIsGivenUp) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) { c->replay_wait_ms = 20000; });
  WaitReady(1);
  worker(0, 0).BreakAtStep(1);
  auto call = Begin(Request(1, 100));
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(call->status.error_message(), HasSubstr("lost its replica 4 times"));
}

TEST_F(RouterTest, ARestartBetweenRequestsIsNoticed) {
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(1);
  const int port = worker(0, 1).port();
  replicas_[0][1].reset();
  WaitReady(0);
  replicas_[0][1] = std::make_unique<FakeWorker>(Worker({.port = port, .instance = 2}));
  WaitReady(1);
  EXPECT_GE(worker(0, 0).prepares(), 2u);
  ExpectServes(4);
}

TEST_F(RouterTest, EpochsGrowOverRoutersToo) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  const uint64_t first = worker(0, 0).last_epoch();
  router_.reset();
  StartRouter();
  WaitReady(1);
  EXPECT_GT(worker(0, 0).last_epoch(), first);
}

TEST_F(RouterTest, WorkersThatDoNotFitAreRefusedByName) {
  AddReplica({Worker({.protocol_version = 99})});
  AddReplica({Worker({.vocab_size = 32})});
  FakeWorkerOptions other_quantization = Worker();
  other_quantization.quantization = "w4a8kv4";
  AddReplica({other_quantization});
  StartRouter();
  const std::vector<std::vector<std::string>> expected = {
      {"protocol_version is '99'", worker(0, 0).address()},
      {"model.vocab_size is '32', must be '4096'", worker(1, 0).address()},
      {"model.quantization is 'w4a8kv4', must be 'bf16'", worker(2, 0).address()}};
  WaitFor("three errors", [](const auto& status) {
    int errors = 0;
    for (const auto& replica : status.replicas()) errors += replica.last_error().empty() ? 0 : 1;
    return errors == 3;
  });
  for (int i = 0; i < 3; ++i) {
    const auto replica = Status().replicas(i);
    EXPECT_FALSE(replica.ready());
    EXPECT_EQ(replica.state(), "down");
    for (const std::string& part : expected[static_cast<size_t>(i)]) EXPECT_THAT(replica.last_error(), HasSubstr(part));
  }
  auto call = Begin(Request(1, 5));
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(RetryAfter(FromGrpcStatus(call->status)).has_value());
}

TEST_F(RouterTest, RanksOfDifferentCheckpointsAreRefused) {
  AddReplica({Worker({.fingerprint = "one"}), Worker({.fingerprint = "two"})});
  StartRouter();
  WaitFor("an error", [](const auto& status) { return !status.replicas(0).last_error().empty(); });
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr("model.fingerprint is 'two', must be 'one'"));
}

TEST_F(RouterTest, WorkersMayAppearLateAndInAnyOrder) {
  // Ports of workers that are gone again.
  std::vector<int> ports;
  AddReplica({Worker(), Worker()});
  for (auto& w : replicas_[0]) ports.push_back(w->port());
  StartRouter([&](RouterConfig*) {
    replicas_[0][0].reset();
    replicas_[0][1].reset();
  });
  WaitFor("an error", [](const auto& status) { return !status.replicas(0).last_error().empty(); });
  replicas_[0][1] = std::make_unique<FakeWorker>(Worker({.port = ports[1]}));
  replicas_[0][0] = std::make_unique<FakeWorker>(Worker({.port = ports[0]}));
  WaitReady(1);
  ExpectServes(6);
}

TEST_F(RouterTest, ADrainingWorkerFinishesWhatRunsAndGetsNothingNew) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 0).HoldAfterStep(10);
  auto running = Begin(Request(1, 50));
  worker(0, 0).WaitForSteps(10);
  worker(0, 0).Drain();
  WaitReady(0);
  auto refused = Begin(Request(2, 5));
  Wait(refused.get());
  EXPECT_EQ(refused->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  worker(0, 0).Release();
  Wait(running.get());
  ExpectExact(*running);
}

TEST_F(RouterTest, ACancelledCallFreesItsPages) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 0).HoldAfterStep(5);
  auto call = Begin(Request(1, 3000));
  worker(0, 0).WaitForSteps(5);
  call->context.TryCancel();
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::CANCELLED);
  worker(0, 0).Release();
  WaitIdle();
  EXPECT_LT(Status().replicas(0).steps(), 100u) << "it ran on";
  ExpectServes(2);
}

TEST_F(RouterTest, ADeadlineEndsTheRequest) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 0).HoldAfterStep(3);
  v1::GenerateRequest request = Request(1, 3000);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(200));
  auto reader = stub_->Generate(&context, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  worker(0, 0).Release();
  WaitIdle();
}

TEST_F(RouterTest, AStopStringFreesTheSequenceAtOnce) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(1, 3000);
  const std::vector<uint32_t> all = Expected(request);
  v1::DetokenizeRequest detokenize;
  v1::DetokenizeResponse stop;
  detokenize.set_skip_special_tokens(true);
  for (size_t i = 10; i < 16; ++i) detokenize.add_input_ids(all[i]);
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Detokenize(&context, detokenize, &stop).ok());
  ASSERT_FALSE(stop.text().empty());
  request.mutable_sampling_params()->add_stop(stop.text());
  auto call = Begin(request);
  Wait(call.get());
  ASSERT_TRUE(call->status.ok()) << call->status.error_message();
  EXPECT_EQ(call->finishes.at(0).matched_stop_str(), stop.text());
  EXPECT_LE(call->ids.at(0).size(), 16u);
  EXPECT_EQ(call->finishes.at(0).usage().completion_tokens(), call->ids.at(0).size());
  WaitIdle();
  EXPECT_LT(Status().replicas(0).steps(), 2500u);
}

TEST_F(RouterTest, FullQueuesRefuseWithNumbers) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) {
    c->max_sequences = 1;
    c->max_waiting_requests = 2;
  });
  WaitReady(1);
  worker(0, 0).HoldAfterStep(2);
  std::vector<std::unique_ptr<Call>> calls;
  calls.push_back(Begin(Request(0, 30)));
  WaitFor("a running request", [](const auto& s) { return s.replicas(0).num_requests_running() == 1; });
  for (uint32_t i = 1; i <= 2; ++i) {
    calls.push_back(Begin(Request(i, 30)));
    WaitFor("a waiting request", [i](const auto& s) { return s.replicas(0).num_requests_waiting() == i; });
  }
  auto refused = Begin(Request(9, 30));
  Wait(refused.get());
  EXPECT_EQ(refused->status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused->status.error_message(), HasSubstr("2 wait, 1 more would exceed 2 (max-waiting-requests)"));
  EXPECT_TRUE(RetryAfter(FromGrpcStatus(refused->status)).has_value());
  worker(0, 0).Release();
  for (auto& call : calls) {
    Wait(call.get());
    ExpectExact(*call);
  }
}

// Free slots are not a queue: of a burst as many are served as run and wait, however late the scheduler thread looks.
TEST_F(RouterTest, ABurstFillsSlotsAndQueue) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) {
    c->max_sequences = 4;
    c->max_waiting_requests = 3;
  });
  WaitReady(1);
  worker(0, 0).HoldAfterStep(0);
  std::vector<std::unique_ptr<Call>> calls;
  for (uint32_t i = 0; i < 20; ++i) calls.push_back(Begin(Request(i, 5)));
  WaitFor("a full queue", [](const auto& s) {
    return s.replicas(0).num_requests_running() + s.replicas(0).num_requests_waiting() == 4 + 3;
  });
  worker(0, 0).Release();
  int served = 0;
  for (auto& call : calls) {
    Wait(call.get());
    if (call->status.ok()) {
      ++served;
      ExpectExact(*call);
    } else {
      EXPECT_EQ(call->status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << call->status.error_message();
    }
  }
  EXPECT_GE(served, 7);
}

TEST_F(RouterTest, BadRequestsNameFieldValueAndLimit) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(1, 10);
  request.mutable_sampling_params()->set_top_p(1.5f);
  request.mutable_sampling_params()->set_n(9);
  auto call = Begin(request);
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FieldViolations(FromGrpcStatus(call->status)).size(), 2u);
  EXPECT_THAT(call->status.error_message(), HasSubstr("sampling_params.top_p is 1.5"));

  v1::GenerateRequest huge;
  huge.set_text(std::string(1 << 20, 'x'));
  auto refused = Begin(huge);
  Wait(refused.get());
  EXPECT_EQ(refused->status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  huge.set_text(std::string(8 << 20, 'x'));
  auto too_large = Begin(huge);
  Wait(too_large.get());
  EXPECT_EQ(too_large->status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ExpectServes(3);
}

TEST_F(RouterTest, InvalidUtf8IsNamed) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  const std::string bytes("\x12\x02\xff\xfe", 4);  // GenerateRequest.text, two bytes that are not UTF-8
  grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto call = stub.PrepareUnaryCall(&context, "/nibble.v1.Inference/Generate", request, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("not UTF-8"));
  ExpectServes(3);
}

TEST_F(RouterTest, StopDrainsAndThenRefuses) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 0).HoldAfterStep(10);
  auto running = Begin(Request(1, 50));
  worker(0, 0).WaitForSteps(10);
  std::thread stopping([&] { router_->Stop(seconds(30)); });
  std::unique_ptr<Call> refused;
  do {  // until the drain has begun
    refused = Begin(Request(2, 1));
    if (refused->request.sampling_params().max_tokens() == 1) {
      std::this_thread::sleep_for(milliseconds(5));
      refused->context.TryCancel();
    }
    Wait(refused.get());
  } while (refused->status.error_code() != grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(refused->status.error_message(), HasSubstr("draining"));
  worker(0, 0).Release();
  Wait(running.get());
  ExpectExact(*running);
  stopping.join();
}

TEST_F(RouterTest, StopEndsWhatDoesNotEndInTime) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  worker(0, 0).HoldAfterStep(10);
  auto running = Begin(Request(1, 50));
  worker(0, 0).WaitForSteps(10);
  router_->Stop(milliseconds(50));
  Wait(running.get());
  EXPECT_EQ(running->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  worker(0, 0).Release();
}

// Starts, cancels, disconnects and stop strings from many clients at once; afterwards nothing is left.
TEST_F(RouterTest, ManyClientsInDisorderLeaveNothingBehind) {
  AddReplica({Worker({.num_pages = 24}), Worker({.num_pages = 24})});
  AddReplica({Worker({.num_pages = 24}), Worker({.num_pages = 24})});
  StartRouter([](RouterConfig* c) { c->max_sequences = 8; });
  WaitReady(2);
  std::vector<std::thread> clients;
  for (uint32_t t = 0; t < 8; ++t) {
    clients.emplace_back([&, t] {
      for (uint32_t i = 0; i < 12; ++i) {
        auto request = Request(t * 100 + i, 20 + i * 5, 10 + i * 20);
        if (i % 3 == 0) request.mutable_sampling_params()->set_n(2);
        auto call = Begin(request);
        if (i % 4 == 1) call->context.TryCancel();
        Wait(call.get());
        if (i % 4 != 1) ExpectExact(*call);
      }
    });
  }
  for (auto& client : clients) client.join();
  WaitIdle();
}

}  // namespace
}  // namespace nibble
