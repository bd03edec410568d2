// Cancelling, deadlines, full queues and many clients at once: nothing is left behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "common/rpc/status.h"
#include "tests/router/router_rig.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

using RouterLoad = RouterTest;

TEST_F(RouterLoad, ACancelledCallFreesItsPages) {
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

TEST_F(RouterLoad, ADeadlineEndsTheRequest) {
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

TEST_F(RouterLoad, FullQueuesRefuseWithNumbers) {
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

TEST_F(RouterLoad, ABurstFillsSlotsAndQueue) {
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

TEST_F(RouterLoad, ManyClientsInDisorderLeaveNothingBehind) {
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
}  // namespace nibble::testing
