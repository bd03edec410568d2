// What the service does when something hangs, ends or is too much: steps, loads, peers, streams, itself.
#include "tests/worker/service_rig.h"

namespace nibble {
namespace {

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
