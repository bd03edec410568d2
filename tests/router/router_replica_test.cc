// How a replica forms: restarts, epochs, workers that do not fit or come late.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/rpc/status.h"
#include "tests/router/router_rig.h"

namespace nibble::testing {
namespace {

using ::testing::HasSubstr;

using RouterReplica = RouterTest;

TEST_F(RouterReplica, ARestartBetweenRequestsIsNoticed) {
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

TEST_F(RouterReplica, EpochsGrowOverRoutersToo) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  const uint64_t first = worker(0, 0).last_epoch();
  router_.reset();
  StartRouter();
  WaitReady(1);
  EXPECT_GT(worker(0, 0).last_epoch(), first);
}

TEST_F(RouterReplica, WorkersThatDoNotFitAreRefusedByName) {
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

TEST_F(RouterReplica, RanksOfDifferentCheckpointsAreRefused) {
  AddReplica({Worker({.fingerprint = "one"}), Worker({.fingerprint = "two"})});
  StartRouter();
  WaitFor("an error", [](const auto& status) { return !status.replicas(0).last_error().empty(); });
  EXPECT_THAT(Status().replicas(0).last_error(), HasSubstr("model.fingerprint is 'two', must be 'one'"));
}

TEST_F(RouterReplica, WorkersMayAppearLateAndInAnyOrder) {
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

}  // namespace
}  // namespace nibble::testing
