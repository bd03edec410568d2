// Shutting down: a worker that drains, a router that drains.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>

#include "tests/router/router_rig.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

using RouterDrain = RouterTest;

TEST_F(RouterDrain, ADrainingWorkerFinishesWhatRunsAndGetsNothingNew) {
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

TEST_F(RouterDrain, StopDrainsAndThenRefuses) {
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

TEST_F(RouterDrain, StopEndsWhatDoesNotEndInTime) {
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

}  // namespace
}  // namespace nibble::testing
