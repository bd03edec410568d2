#include "worker/mock_engine.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

namespace nibble {
namespace {

std::unique_ptr<Engine> MakeEngine(int rank = 0, MockOptions options = {}) {
  options.model.set_vocab_size(32000);
  options.model.set_num_layers(2);
  options.model.set_num_kv_heads(4);
  auto backend = MakeMockBackend(options);
  std::vector<std::string> endpoints;
  for (int r = 0; r < 2; ++r) endpoints.push_back((*backend->PrepareCommunicator(r, 2))->endpoint());
  auto communicator = (*backend->PrepareCommunicator(rank, 2))->Connect(endpoints);
  EXPECT_TRUE(communicator.ok());
  auto engine = (*backend->Load(rank, 2))
                    ->CreateEngine(*std::move(communicator),
                                   {.kv_memory_bytes = 1 << 20, .max_sequences = 4, .max_step_tokens = 256});
  EXPECT_TRUE(engine.ok()) << engine.status();
  return *std::move(engine);
}

struct Request {
  uint32_t slot = 0;
  float temperature = 1;
  uint64_t seed = 42;
  std::vector<uint32_t> known;  // prompt and what was generated before
  uint32_t num_prompt_tokens = 0;
};

// Generates `count` tokens with prefill chunks of `chunk` tokens.
std::vector<uint32_t> Generate(Engine& engine, const Request& request, int count, int chunk) {
  std::vector<uint32_t> tokens;
  v1::StepPlan plan;
  plan.add_release_slots(request.slot);
  v1::StepResult ignored;
  static_cast<void>(engine.Execute(plan, &ignored));
  for (uint32_t done = 0; done < request.known.size();) {
    plan.Clear();
    if (done == 0) {
      auto* start = plan.add_start();
      start->set_slot(request.slot);
      start->mutable_token_ids()->Add(request.known.begin(), request.known.end());
      start->set_num_prompt_tokens(request.num_prompt_tokens);
      start->mutable_sampling()->set_temperature(request.temperature);
      start->mutable_sampling()->set_seed(request.seed);
      for (uint32_t page = 0; page < 4; ++page) start->add_page_ids(page);
    }
    auto* next = plan.add_prefill();
    next->set_slot(request.slot);
    next->set_num_tokens(
        std::min<uint32_t>(static_cast<uint32_t>(chunk), static_cast<uint32_t>(request.known.size()) - done));
    done += next->num_tokens();
    next->set_sample(done == request.known.size());
    v1::StepResult result;
    EXPECT_TRUE(engine.Execute(plan, &result).ok());
    tokens.insert(tokens.end(), result.token_ids().begin(), result.token_ids().end());
  }
  while (static_cast<int>(tokens.size()) < count) {
    plan.Clear();
    plan.add_decode_slots(request.slot);
    v1::StepResult result;
    const absl::Status status = engine.Execute(plan, &result);
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok() || result.token_ids().empty()) break;
    tokens.insert(tokens.end(), result.token_ids().begin(), result.token_ids().end());
  }
  return tokens;
}

std::vector<uint32_t> Prompt(uint32_t size) {
  std::vector<uint32_t> ids(size);
  for (uint32_t i = 0; i < size; ++i) ids[i] = i * 7 % 1000;
  return ids;
}

TEST(MockEngine, TokensDependOnTheRequestAlone) {
  auto engine = MakeEngine();
  const Request request{.known = Prompt(50), .num_prompt_tokens = 50};
  const auto tokens = Generate(*engine, request, 20, 50);
  ASSERT_EQ(tokens.size(), 20u);
  EXPECT_EQ(Generate(*engine, request, 20, 7), tokens) << "chunking";
  Request elsewhere = request;
  elsewhere.slot = 3;
  EXPECT_EQ(Generate(*engine, elsewhere, 20, 50), tokens) << "slot";
  Request replayed = request;
  replayed.known.insert(replayed.known.end(), tokens.begin(), tokens.begin() + 8);
  EXPECT_EQ(Generate(*engine, replayed, 12, 50), std::vector<uint32_t>(tokens.begin() + 8, tokens.end())) << "replay";
  Request seeded = request;
  seeded.seed = 43;
  EXPECT_NE(Generate(*engine, seeded, 20, 50), tokens) << "seed";
}

TEST(MockEngine, GreedyTokensDependOnThePrompt) {
  auto engine = MakeEngine();
  const Request request{.temperature = 0, .seed = 1, .known = Prompt(50), .num_prompt_tokens = 50};
  const auto tokens = Generate(*engine, request, 20, 50);
  Request seeded = request;
  seeded.seed = 2;
  EXPECT_EQ(Generate(*engine, seeded, 20, 50), tokens);
  Request other = request;
  other.known[10] = 999;
  EXPECT_NE(Generate(*engine, other, 20, 50), tokens);
}

TEST(MockEngine, OnlyRankZeroAnswersTokens) {
  auto engine = MakeEngine(1);
  v1::StepPlan plan;
  auto* start = plan.add_start();
  start->add_token_ids(5);
  start->set_num_prompt_tokens(1);
  start->add_page_ids(0);
  start->mutable_sampling()->set_logprobs(true);
  auto* chunk = plan.add_prefill();
  chunk->set_num_tokens(1);
  chunk->set_sample(true);
  plan.set_step(9);
  v1::StepResult result;
  ASSERT_TRUE(engine->Execute(plan, &result).ok());
  EXPECT_EQ(result.step(), 9u);
  EXPECT_TRUE(result.token_ids().empty());
  EXPECT_TRUE(result.logprobs().empty());
}

TEST(MockEngine, LogprobsComeInRowOrder) {
  auto engine = MakeEngine();
  v1::StepPlan plan;
  auto* start = plan.add_start();
  for (uint32_t id = 0; id < 6; ++id) start->add_token_ids(id);
  start->set_num_prompt_tokens(6);
  start->add_page_ids(0);
  start->mutable_sampling()->set_logprobs(true);
  start->mutable_sampling()->set_num_top_logprobs(3);
  start->mutable_sampling()->set_prompt_logprobs(true);
  auto* chunk = plan.add_prefill();
  chunk->set_num_tokens(6);
  chunk->set_sample(true);
  v1::StepResult result;
  ASSERT_TRUE(engine->Execute(plan, &result).ok());
  EXPECT_EQ(result.prompt_logprobs_size(), 5) << "the first token has none";
  ASSERT_EQ(result.logprobs_size(), 1);
  EXPECT_EQ(result.logprobs(0).token_id(), result.token_ids(0));
  EXPECT_EQ(result.logprobs(0).top_ids_size(), 3);
}

TEST(MockEngine, AStepTakesItsSimulatedTime) {
  auto engine = MakeEngine(0, {.step_time = std::chrono::microseconds(3000)});
  v1::StepResult result;
  ASSERT_TRUE(engine->Execute({}, &result).ok());
  EXPECT_GE(result.forward_us(), 3000u);
}

TEST(MockEngine, SequencesNeedPages) {
  auto engine = MakeEngine();
  v1::StepPlan plan;
  auto* start = plan.add_start();
  for (uint32_t id = 0; id < 64; ++id) start->add_token_ids(id);
  start->set_num_prompt_tokens(64);
  start->add_page_ids(0);
  auto* chunk = plan.add_prefill();
  chunk->set_num_tokens(64);
  chunk->set_sample(true);
  v1::StepResult result;
  ASSERT_TRUE(engine->Execute(plan, &result).ok());
  v1::StepPlan decode;
  decode.add_decode_slots(0);
  const absl::Status status = engine->Execute(decode, &result);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("1 pages hold 64"), std::string::npos) << status;
  decode.add_page_slots(0);
  decode.add_page_ids(1);
  EXPECT_TRUE(engine->Execute(decode, &result).ok());
}

}  // namespace
}  // namespace nibble
