// The scheduler, one rule at a time: exact plans and events of small stories. What holds in every story is checked by
// scheduler_simulation_test.cc.
#include "router/scheduler.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr TimePoint kNow{std::chrono::seconds(100)};

std::vector<uint32_t> Tokens(uint32_t n, uint32_t first = 0) {
  std::vector<uint32_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::unique_ptr<Sequence> NewSequence(uint64_t id, std::vector<uint32_t> prompt, uint32_t max_tokens) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = sequence->arrival = id;
  sequence->num_prompt_tokens = static_cast<uint32_t>(prompt.size());
  sequence->token_ids = std::move(prompt);
  sequence->max_tokens = max_tokens;
  return sequence;
}

// Pages of 4 tokens; everything else large unless a test says otherwise.
SchedulerConfig Config() {
  return {.num_pages = 100,
          .page_tokens = 4,
          .max_sequences = 8,
          .max_step_tokens = 64,
          .max_prefill_chunk = 64,
          .max_steps_in_flight = 2};
}

// Rows of a plan that sample: as many tokens as its result has.
uint32_t NumSamples(const v1::StepPlan& plan) {
  uint32_t samples = static_cast<uint32_t>(plan.decode_slots_size());
  for (const v1::PrefillChunk& chunk : plan.prefill()) samples += chunk.sample();
  return samples;
}

class SchedulerTest : public ::testing::Test {
 protected:
  void Make(const SchedulerConfig& config) { scheduler_ = std::make_unique<Scheduler>(config); }

  v1::StepPlan Schedule() {
    const auto plan = scheduler_->Schedule(kNow, &events_);
    EXPECT_TRUE(plan.has_value()) << "expected a plan";
    return plan.value_or(v1::StepPlan());
  }
  void ExpectNothingToDo() { EXPECT_FALSE(scheduler_->Schedule(kNow, &events_).has_value()); }

  // The result of the oldest plan in flight, every row sampling the given token.
  static v1::StepResult Result(uint64_t step, std::vector<uint32_t> tokens) {
    v1::StepResult result;
    result.set_step(step);
    result.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    return result;
  }
  void Commit(const v1::StepResult& result) {
    const absl::Status status = scheduler_->Commit(result, kNow, &events_);
    EXPECT_TRUE(status.ok()) << status;
  }
  void Commit(uint64_t step, std::vector<uint32_t> tokens) { Commit(Result(step, std::move(tokens))); }
  std::vector<SequenceEvent> TakeEvents() { return std::move(events_); }

  std::unique_ptr<Scheduler> scheduler_ = std::make_unique<Scheduler>(Config());
  std::vector<SequenceEvent> events_;
};

TEST_F(SchedulerTest, FirstPlanStartsPrefillsAndSamples) {
  auto sequence = NewSequence(1, Tokens(6), 3);
  sequence->sampling.set_seed(9);
  scheduler_->Add(std::move(sequence));
  EXPECT_FALSE(scheduler_->idle());
  const v1::StepPlan plan = Schedule();
  EXPECT_EQ(plan.step(), 1u);
  ASSERT_EQ(plan.start_size(), 1);
  const v1::StartSequence& start = plan.start(0);
  EXPECT_EQ(start.slot(), 0u);
  EXPECT_THAT(start.token_ids(), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_EQ(start.num_prompt_tokens(), 6u);
  EXPECT_EQ(start.num_cached_tokens(), 0u);
  EXPECT_THAT(start.page_ids(), ElementsAre(0, 1));
  EXPECT_EQ(start.sampling().seed(), 9u);
  ASSERT_EQ(plan.prefill_size(), 1);
  EXPECT_EQ(plan.prefill(0).num_tokens(), 6u);
  EXPECT_TRUE(plan.prefill(0).sample());
  EXPECT_EQ(plan.decode_slots_size(), 0);
}

TEST_F(SchedulerTest, RunsAheadAndNeverBeyondMaxTokens) {
  scheduler_->Add(NewSequence(1, Tokens(6), 3));
  Schedule();                              // samples output 1
  const v1::StepPlan second = Schedule();  // output 2, before output 1 is known
  EXPECT_THAT(second.decode_slots(), ElementsAre(0));
  EXPECT_EQ(second.page_ids_size(), 0) << "position 6 is on page 1";
  ExpectNothingToDo();  // two steps are in flight
  Commit(1, {50});
  Schedule();  // output 3, the last
  Commit(2, {51});
  ExpectNothingToDo();  // max_tokens are on their way
  EXPECT_EQ(scheduler_->steps_in_flight(), 1u);
  Commit(3, {52});
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(3));
  EXPECT_EQ(events[0].token_id, 50u);
  EXPECT_FALSE(events[1].finish.has_value());
  EXPECT_EQ(events[2].finish, v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(events[2].at, kNow);
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(scheduler_->stats().free_pages, 100u);
}

TEST_F(SchedulerTest, DecodeGetsAPageWhenItsPositionNeedsOne) {
  scheduler_->Add(NewSequence(1, Tokens(4), 8));
  EXPECT_THAT(Schedule().start(0).page_ids(), ElementsAre(0));
  const v1::StepPlan plan = Schedule();  // position 4
  EXPECT_THAT(plan.page_slots(), ElementsAre(0));
  EXPECT_THAT(plan.page_ids(), ElementsAre(1));
  Commit(1, {50});
  EXPECT_EQ(Schedule().page_ids_size(), 0) << "position 5";
}

TEST_F(SchedulerTest, AStopDiscardsWhatWasComputedBeyondIt) {
  auto sequence = NewSequence(1, Tokens(4), 8);
  sequence->stop_ids = {7, 9};
  scheduler_->Add(std::move(sequence));
  Schedule();
  Schedule();
  Commit(1, {9});
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].finish, v1::FINISH_REASON_STOP);
  EXPECT_EQ(events[0].token_id, 9u);
  EXPECT_FALSE(scheduler_->idle()) << "step 2 is in flight";
  Commit(2, {5});
  EXPECT_THAT(TakeEvents(), IsEmpty());
  EXPECT_TRUE(scheduler_->idle());
}

TEST_F(SchedulerTest, StopIdsCountFromMinTokensOn) {
  auto sequence = NewSequence(1, Tokens(4), 8);
  sequence->stop_ids = {9};
  sequence->min_tokens = 2;
  scheduler_->Add(std::move(sequence));
  for (uint64_t step = 1; step <= 3; ++step) {
    Schedule();
    Commit(step, {9});
  }
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(3));
  EXPECT_FALSE(events[1].finish.has_value());
  EXPECT_EQ(events[2].finish, v1::FINISH_REASON_STOP) << "the third token is the first that may stop";
}

TEST_F(SchedulerTest, SplitsPromptsByChunkAndBudgetWithDecodesFirst) {
  SchedulerConfig config = Config();
  config.max_step_tokens = 10;
  config.max_prefill_chunk = 8;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(4), 8));
  Schedule();
  scheduler_->Add(NewSequence(2, Tokens(20, 100), 8));
  scheduler_->Add(NewSequence(3, Tokens(20, 200), 8));
  const v1::StepPlan plan = Schedule();
  EXPECT_THAT(plan.decode_slots(), ElementsAre(0));
  ASSERT_EQ(plan.prefill_size(), 2);
  EXPECT_EQ(plan.prefill(0).num_tokens(), 8u);
  EXPECT_FALSE(plan.prefill(0).sample());
  EXPECT_EQ(plan.prefill(1).num_tokens(), 1u) << "10 rows - 1 decode - 8";
  Commit(1, {50});
  const v1::StepPlan next = Schedule();
  EXPECT_EQ(next.start_size(), 0);
  EXPECT_EQ(next.prefill(0).num_tokens(), 8u);
  Commit(2, {51});  // chunks that do not sample have no token
  const v1::StepPlan last = Schedule();
  EXPECT_EQ(last.prefill(0).num_tokens(), 4u);
  EXPECT_TRUE(last.prefill(0).sample());
  EXPECT_EQ(last.prefill(1).num_tokens(), 5u);
}

TEST_F(SchedulerTest, AdmitsByPriorityThenArrivalWithoutOvertaking) {
  SchedulerConfig config = Config();
  config.num_pages = 8;
  config.max_sequences = 2;
  Make(config);
  const auto add = [&](uint64_t id, int32_t priority, uint32_t prompt) {
    auto sequence = NewSequence(id, Tokens(prompt, static_cast<uint32_t>(id) * 100), 2);
    sequence->priority = priority;
    scheduler_->Add(std::move(sequence));
  };
  add(1, 0, 8);
  add(2, 0, 24);
  add(3, 5, 16);
  add(4, -1, 4);
  const v1::StepPlan plan = Schedule();  // 3 and 1 fill both slots; 2 would not fit, 4 must not overtake it
  ASSERT_EQ(plan.start_size(), 2);
  EXPECT_EQ(plan.start(0).token_ids(0), 300u);
  EXPECT_EQ(plan.start(1).token_ids(0), 100u);
  Commit(1, {1, 1});
  scheduler_->Cancel(3);
  EXPECT_EQ(Schedule().start_size(), 0) << "a slot is free, but sequence 2 lacks pages and 4 waits behind it";
  Commit(2, {1});
  EXPECT_EQ(Schedule().start(0).token_ids(0), 200u);
}

TEST_F(SchedulerTest, CancelFreesPagesAtOnceAndTheSlotInTheNextPlan) {
  scheduler_->Add(NewSequence(1, Tokens(8), 8));
  scheduler_->Add(NewSequence(2, Tokens(8, 50), 8));
  Schedule();
  EXPECT_EQ(scheduler_->stats().free_pages, 96u);
  scheduler_->Cancel(1);
  scheduler_->Cancel(77);  // unknown
  EXPECT_EQ(scheduler_->stats().free_pages, 98u);
  EXPECT_EQ(scheduler_->stats().running, 1u);
  const v1::StepPlan plan = Schedule();
  EXPECT_THAT(plan.release_slots(), ElementsAre(0));
  EXPECT_THAT(plan.decode_slots(), ElementsAre(1));
  Commit(1, {5, 6});
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].sequence_id, 2u);
  EXPECT_THAT(Schedule().release_slots(), IsEmpty()) << "said once";
}

TEST_F(SchedulerTest, DeadlinesEndWaitingAndRunningSequences) {
  SchedulerConfig config = Config();
  config.max_sequences = 1;
  Make(config);
  for (uint64_t id = 1; id <= 3; ++id) {
    auto sequence = NewSequence(id, Tokens(4), 8);
    if (id < 3) sequence->deadline = kNow + std::chrono::milliseconds(id);
    scheduler_->Add(std::move(sequence));
  }
  Schedule();
  Commit(1, {5});
  TakeEvents();
  const auto plan = scheduler_->Schedule(kNow + std::chrono::milliseconds(2), &events_);
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(2));
  EXPECT_EQ(events[0].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(events[0].status.message(), HasSubstr("when 1 of at most 8 output tokens"));
  EXPECT_THAT(events[1].status.message(), HasSubstr("when 0 of at most 8 output tokens"));
  ASSERT_TRUE(plan.has_value());
  EXPECT_THAT(plan->release_slots(), ElementsAre(0));
  EXPECT_EQ(plan->start(0).slot(), 0u) << "the slot is used again in the plan that releases it";
}

TEST_F(SchedulerTest, RefusesWhatCanNeverFit) {
  SchedulerConfig config = Config();
  config.num_pages = 4;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(10), 7));  // 16 positions: the last token is never fed back
  scheduler_->Add(NewSequence(2, Tokens(10), 8));
  Schedule();
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].sequence_id, 2u);
  EXPECT_EQ(events[0].status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(events[0].status.message(),
            "request needs 5 KV pages (10 prompt tokens + max_tokens 8, 4 tokens per page), a replica has 4");
}

TEST_F(SchedulerTest, CutsADefaultMaxTokensToWhatThePagesHold) {
  SchedulerConfig config = Config();
  config.num_pages = 2;
  Make(config);
  for (uint64_t id = 1; id <= 3; ++id) {
    auto sequence = NewSequence(id, Tokens(id == 3 ? 9 : 6), 1000);
    sequence->max_tokens_open = true;
    if (id == 2) sequence->min_tokens = 4;
    scheduler_->Add(std::move(sequence));
  }
  for (uint64_t step = 1; step <= 3; ++step) {
    Schedule();
    Commit(step, {50});
  }
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(5));
  EXPECT_EQ(events[0].sequence_id, 2u) << "4 tokens at least, 3 fit";
  EXPECT_EQ(events[0].status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(events[1].sequence_id, 3u) << "the prompt alone is too long";
  EXPECT_EQ(events[1].status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(events[4].finish, v1::FINISH_REASON_LENGTH) << "6 + 3 - 1 positions fill 2 pages";
}

TEST_F(SchedulerTest, ComputesASharedPromptOnce) {
  SchedulerConfig config = Config();
  config.max_prefill_chunk = 8;
  Make(config);
  for (uint64_t id = 1; id <= 4; ++id) scheduler_->Add(NewSequence(id, Tokens(40), 4));
  uint32_t rows = 0;
  for (uint64_t step = 1; scheduler_->stats().waiting > 0 || step == 1; ++step) {
    const v1::StepPlan plan = Schedule();
    for (const v1::PrefillChunk& chunk : plan.prefill()) rows += chunk.num_tokens();
    Commit(step, std::vector<uint32_t>(NumSamples(plan), 90));
    ASSERT_LT(step, 20u);
  }
  EXPECT_EQ(rows, 40u + 3 * 4) << "the siblings compute their last page only";
  EXPECT_EQ(scheduler_->stats().prefix_hits_tokens, 3 * 36u);
  EXPECT_EQ(scheduler_->stats().prefix_queries_tokens, 4 * 40u);
}

TEST_F(SchedulerTest, ASequenceSharesPagesFilledInTheSameStep) {
  scheduler_->Add(NewSequence(1, Tokens(10), 4));
  scheduler_->Add(NewSequence(2, Tokens(9), 4));
  const v1::StepPlan plan = Schedule();
  ASSERT_EQ(plan.start_size(), 2);
  EXPECT_THAT(plan.start(0).page_ids(), ElementsAre(0, 1, 2));
  EXPECT_THAT(plan.start(1).page_ids(), ElementsAre(0, 1, 3));
  EXPECT_EQ(plan.start(1).num_cached_tokens(), 8u);
  EXPECT_EQ(plan.prefill(1).num_tokens(), 1u);
}

TEST_F(SchedulerTest, GeneratedPagesAreSharedOnceTheirTokensAreKnown) {
  scheduler_->Add(NewSequence(1, Tokens(3), 8));
  Schedule();  // positions 0-2, samples the token of position 3
  Schedule();  // position 3: page 0 is full, but its last token is not known here
  EXPECT_EQ(scheduler_->CachedPrefixTokens({0, 1, 2, 60, 1}, ""), 0u);
  Commit(1, {60});
  EXPECT_EQ(scheduler_->CachedPrefixTokens({0, 1, 2, 60, 1}, ""), 4u);
  EXPECT_EQ(scheduler_->CachedPrefixTokens({0, 1, 2, 60}, ""), 0u) << "the last token is always computed";
  EXPECT_EQ(scheduler_->CachedPrefixTokens({0, 1, 2, 61, 1}, ""), 0u);
  EXPECT_EQ(scheduler_->CachedPrefixTokens({0, 1, 2, 60, 1}, "salt"), 0u);
}

TEST_F(SchedulerTest, SaltsDoNotShare) {
  for (uint64_t id = 1; id <= 2; ++id) {
    auto sequence = NewSequence(id, Tokens(9), 4);
    sequence->cache_salt = id == 1 ? "red" : "blue";
    scheduler_->Add(std::move(sequence));
  }
  const v1::StepPlan plan = Schedule();
  EXPECT_EQ(plan.start(1).num_cached_tokens(), 0u);
  EXPECT_THAT(plan.start(1).page_ids(), ElementsAre(3, 4, 5));
}

TEST_F(SchedulerTest, PreemptsTheLowestRankAndResumesItWithWhatItGenerated) {
  SchedulerConfig config = Config();
  config.num_pages = 4;
  config.max_steps_in_flight = 1;
  config.prefix_cache = false;
  Make(config);
  auto low = NewSequence(1, Tokens(8), 4);  // arrived first, but less important
  low->priority = -1;
  scheduler_->Add(std::move(low));
  scheduler_->Add(NewSequence(2, Tokens(8, 50), 4));
  EXPECT_EQ(Schedule().start_size(), 2);
  Commit(1, {80, 90});                   // rank order: sequence 2 first
  const v1::StepPlan plan = Schedule();  // position 8 of sequence 2 needs a page
  EXPECT_THAT(plan.release_slots(), ElementsAre(1));
  EXPECT_THAT(plan.decode_slots(), ElementsAre(0));
  EXPECT_EQ(plan.start_size(), 0) << "nobody is admitted in a step that preempts";
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  EXPECT_EQ(scheduler_->stats().waiting, 1u);
  Commit(2, {81});
  Schedule();
  Commit(3, {82});
  Schedule();
  Commit(4, {83});  // sequence 2 has its 4 tokens
  const v1::StepPlan resumed = Schedule();
  ASSERT_EQ(resumed.start_size(), 1);
  EXPECT_THAT(resumed.start(0).token_ids(), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 90));
  EXPECT_EQ(resumed.start(0).num_prompt_tokens(), 8u);
  TakeEvents();
  for (uint64_t step = 5; !scheduler_->idle() && step < 20; ++step) {
    Commit(step, {91});
    if (!scheduler_->idle()) Schedule();
  }
  const auto events = TakeEvents();
  EXPECT_EQ(events.back().preemptions, 1u);
}

TEST_F(SchedulerTest, AdmitsNobodyInAStepThatPreempts) {
  SchedulerConfig config = Config();
  config.num_pages = 5;
  config.max_steps_in_flight = 1;
  config.prefix_cache = false;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(8), 4));
  scheduler_->Add(NewSequence(2, Tokens(8, 50), 4));
  Schedule();
  Commit(1, {80, 90});
  auto urgent = NewSequence(3, {7}, 1);
  urgent->priority = 1;
  scheduler_->Add(std::move(urgent));
  const v1::StepPlan plan = Schedule();  // one page is free, two are needed
  EXPECT_THAT(plan.release_slots(), ElementsAre(1));
  EXPECT_EQ(plan.start_size(), 0) << "there would be room, but who was just preempted must not pay for it";
  Commit(2, {81});
  EXPECT_EQ(Schedule().start_size(), 1);
}

TEST_F(SchedulerTest, APreemptedSequenceWaitsForItsResultsInFlight) {
  SchedulerConfig config = Config();
  config.num_pages = 4;
  config.prefix_cache = false;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(8), 3));
  scheduler_->Add(NewSequence(2, Tokens(7, 50), 3));
  Schedule();  // both sample
  Schedule();  // sequence 1 needs a page: sequence 2 goes, its first token still to come
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  scheduler_->Cancel(1);  // now there is room
  ExpectNothingToDo();
  Commit(1, {80, 90});
  const v1::StepPlan plan = Schedule();
  ASSERT_EQ(plan.start_size(), 1);
  EXPECT_THAT(plan.start(0).token_ids(), ElementsAre(50, 51, 52, 53, 54, 55, 56, 90));
}

TEST_F(SchedulerTest, APreemptionMakesAdmissionKeepPagesBack) {
  SchedulerConfig config = Config();
  config.num_pages = 10;
  config.max_steps_in_flight = 1;
  config.prefix_cache = false;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(16), 12));
  scheduler_->Add(NewSequence(2, Tokens(12, 50), 12));
  scheduler_->Add(NewSequence(3, Tokens(8, 100), 12));
  EXPECT_EQ(Schedule().start_size(), 3) << "optimistic: 9 pages for the prompts, 1 kept back";
  Commit(1, {1, 2, 3});
  EXPECT_THAT(Schedule().decode_slots(), ElementsAre(0, 1)) << "2 pages needed, 1 free, 2 of sequence 3";
  Commit(2, {1, 2});
  EXPECT_EQ(scheduler_->stats().free_pages, 1u);
  scheduler_->Cancel(2);
  EXPECT_EQ(scheduler_->stats().free_pages, 5u);
  EXPECT_EQ(Schedule().start_size(), 0) << "3 pages for sequence 3, but most of the outputs is kept back now";
}

TEST_F(SchedulerTest, RejectsResultsThatDoNotMatchAndAppliesNothing) {
  auto sequence = NewSequence(1, Tokens(4), 8);
  sequence->sampling.set_logprobs(true);
  EXPECT_EQ(scheduler_->Commit(Result(1, {}), kNow, &events_).code(), absl::StatusCode::kInternal);
  scheduler_->Add(std::move(sequence));
  Schedule();
  v1::StepResult good = Result(1, {5});
  good.add_logprobs()->set_token_id(5);
  v1::StepResult wrong_slot = good;
  wrong_slot.mutable_logprobs(0)->set_slot(3);
  v1::StepResult extra_score = good;
  extra_score.add_prompt_logprobs();
  EXPECT_THAT(scheduler_->Commit(Result(2, {5}), kNow, &events_).message(), HasSubstr("step 2, expected step 1"));
  EXPECT_THAT(scheduler_->Commit(Result(1, {}), kNow, &events_).message(), HasSubstr("0 token_ids, expected 1"));
  EXPECT_THAT(scheduler_->Commit(Result(1, {5, 6}), kNow, &events_).message(), HasSubstr("2 token_ids, expected 1"));
  EXPECT_THAT(scheduler_->Commit(Result(1, {5}), kNow, &events_).message(), HasSubstr("0 logprobs, expected 1"));
  EXPECT_THAT(scheduler_->Commit(wrong_slot, kNow, &events_).message(), HasSubstr("logprobs[0].slot 3, expected 0"));
  EXPECT_THAT(scheduler_->Commit(extra_score, kNow, &events_).message(), HasSubstr("1 prompt_logprobs, expected 0"));
  EXPECT_THAT(TakeEvents(), IsEmpty());
  Commit(good);
  EXPECT_EQ(TakeEvents().at(0).scores->logprobs->token_id(), 5u);
}

TEST_F(SchedulerTest, TakeAllHandsBackEverythingAndAReplayRepeatsNothing) {
  SchedulerConfig config = Config();
  config.max_prefill_chunk = 4;
  config.max_step_tokens = 5;
  Make(config);
  auto first = NewSequence(1, Tokens(8), 4);
  first->sampling.set_prompt_logprobs(true);
  first->use_prefix_cache = false;
  scheduler_->Add(std::move(first));
  scheduler_->Add(NewSequence(2, Tokens(8, 50), 4));
  const auto scored = [](uint64_t step, std::vector<uint32_t> positions, std::vector<uint32_t> tokens) {
    v1::StepResult result = Result(step, std::move(tokens));
    for (const uint32_t position : positions) result.add_prompt_logprobs()->set_token_id(position);
    return result;
  };
  Schedule();
  Commit(scored(1, {1, 2, 3, 4}, {}));
  ASSERT_THAT(events_, SizeIs(1));
  EXPECT_THAT(TakeEvents()[0].scores->prompt_logprobs, SizeIs(4));
  Schedule();  // in flight when the replica is lost
  std::vector<std::unique_ptr<Sequence>> sequences = scheduler_->TakeAll();
  ASSERT_THAT(sequences, SizeIs(2));
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(sequences[0]->id, 1u);
  EXPECT_EQ(sequences[0]->prompt_logprobs_sent, 4u);
  EXPECT_EQ(sequences[0]->preemptions, 1u);
  scheduler_->SetCapacity(50);
  EXPECT_EQ(scheduler_->stats().free_pages, 50u);

  for (auto& sequence : sequences) scheduler_->Add(std::move(sequence));
  EXPECT_EQ(Schedule().step(), 1u) << "a new stream counts from 1";
  Commit(scored(1, {1, 2, 3, 4}, {}));
  EXPECT_THAT(TakeEvents(), IsEmpty()) << "all of them were sent before";
  Schedule();
  Commit(scored(2, {5, 6, 7}, {30}));
  const auto events = TakeEvents();
  ASSERT_THAT(events, SizeIs(2)) << "scores come before the token";
  ASSERT_THAT(events[0].scores->prompt_logprobs, SizeIs(3));
  EXPECT_EQ(events[0].scores->prompt_logprobs[0].token_id(), 5u);
  EXPECT_FALSE(events[0].token_id.has_value());
  EXPECT_EQ(events[1].token_id, 30u);
  EXPECT_EQ(events[1].scores, nullptr);
}

TEST_F(SchedulerTest, WithoutCapacityNothingIsScheduledOrRefused) {
  SchedulerConfig config = Config();
  config.num_pages = 0;
  Make(config);
  scheduler_->Add(NewSequence(1, Tokens(8), 4));
  ExpectNothingToDo();
  EXPECT_THAT(TakeEvents(), IsEmpty());
  scheduler_->SetCapacity(2);
  ExpectNothingToDo();
  EXPECT_EQ(TakeEvents().at(0).status.code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(SchedulerTest, StampsTimesForMetrics) {
  scheduler_->Add(NewSequence(1, Tokens(4), 8));
  scheduler_->Schedule(kNow, &events_);
  const TimePoint later = kNow + std::chrono::milliseconds(5);
  ASSERT_TRUE(scheduler_->Commit(Result(1, {5}), later, &events_).ok());
  EXPECT_EQ(events_.at(0).first_scheduled_at, kNow);
  EXPECT_EQ(events_.at(0).at, later);
}

TEST_F(SchedulerTest, ASteadyDecodePlanIsSmall) {
  SchedulerConfig config;
  config.num_pages = 100000;
  Make(config);
  for (uint64_t id = 1; id <= 256; ++id)
    scheduler_->Add(NewSequence(id, Tokens(64, static_cast<uint32_t>(id) * 64), 500));
  uint64_t step = 0;
  while (scheduler_->stats().waiting > 0) {
    const v1::StepPlan plan = Schedule();
    Commit(++step, std::vector<uint32_t>(NumSamples(plan), 1));
    ASSERT_LT(step, 100u);
  }
  for (int i = 0; i < 200; ++i) {
    const v1::StepPlan plan = Schedule();
    if (i > 2) {
      ASSERT_EQ(plan.decode_slots_size(), 256);
    }
    EXPECT_LE(plan.ByteSizeLong(), 4096u) << "also when every sequence gets a page";
    Commit(++step, std::vector<uint32_t>(NumSamples(plan), 1));
  }
}

}  // namespace
}  // namespace nibble
