// Workers break, die, hang and lie while requests run: those go on elsewhere, token for token.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/rpc/status.h"
#include "tests/router/router_rig.h"

namespace nibble::testing {
namespace {

using ::testing::HasSubstr;

using RouterReplay = RouterTest;

TEST_F(RouterReplay, ABrokenStreamIsReplayedElsewhereExactly) {
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

TEST_F(RouterReplay, AKilledWorkerIsReplayedElsewhereExactly) {
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

TEST_F(RouterReplay, AHangingWorkerTripsTheStepTimeout) {
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

TEST_F(RouterReplay, AWrongAnswerTakesTheReplicaDown) {
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

TEST_F(RouterReplay, WithoutAnotherReplicaTheErrorIsClearAndServiceComesBack) {
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

TEST_F(RouterReplay, WithReplayWaitTheClientSeesOnlyAPause) {
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

TEST_F(RouterReplay, WithReplayWaitARequestMayComeBeforeItsReplica) {
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

TEST_F(RouterReplay, ARequestThatKillsEveryReplicaIsGivenUp) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) { c->replay_wait_ms = 20000; });
  WaitReady(1);
  worker(0, 0).BreakAtStep(1);
  auto call = Begin(Request(1, 100));
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(call->status.error_message(), HasSubstr("lost its replica 4 times"));
}

}  // namespace
}  // namespace nibble::testing
