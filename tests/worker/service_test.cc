// What the service answers: the life of a group, and everything a router may get wrong.
#include "tests/worker/service_rig.h"

namespace nibble {
namespace {

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

}  // namespace
}  // namespace nibble
