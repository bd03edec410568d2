// Plans come from the network. Each rule of worker.proto, broken once: field, value and limit in the answer, no crash.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>

#include "google/protobuf/text_format.h"
#include "tests/worker/engine_rig.h"
#include "worker/model/slot_table.h"

namespace nibble::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr SlotLimits kLimits = {
    .max_sequences = 4, .max_step_tokens = 100, .max_context_tokens = 256, .num_pages = 10, .vocab_size = 50};

v1::StepPlan Plan(const std::string& text) {
  v1::StepPlan plan;
  NIBBLE_CHECK(google::protobuf::TextFormat::ParseFromString(text, &plan), text);
  return plan;
}

const char kSampling[] = "sampling { top_p: 1 repetition_penalty: 1 }";

std::string StartText(const std::string& rest) { return "start { " + rest + " " + kSampling + " }"; }

// Slot 0: 70 known tokens, 66 of them computed, pages 3 and 4. Slot 1: one token sampled, page 5.
void Prepare(SlotTable* table) {
  v1::StepPlan plan = Plan("step: 1 " + StartText("slot: 0 num_prompt_tokens: 70 page_ids: 3 page_ids: 4") +
                           StartText("slot: 1 token_ids: 7 num_prompt_tokens: 1 page_ids: 5") +
                           "prefill { slot: 0 num_tokens: 66 } prefill { slot: 1 num_tokens: 1 sample: true }");
  for (uint32_t i = 0; i < 70; ++i) plan.mutable_start(0)->add_token_ids(i % 50);
  StepBatch batch;
  const absl::Status status = table->Apply(plan, &batch);
  NIBBLE_CHECK(status.ok(), status.ToString());
}

struct BadPlan {
  const char* plan;     // after Prepare; step 2 is added
  const char* message;  // part of the answer
};

class BadPlans : public ::testing::TestWithParam<BadPlan> {};

TEST_P(BadPlans, AreRefusedWithFieldValueAndLimit) {
  SlotTable table(kLimits);
  Prepare(&table);
  StepBatch batch;
  const absl::Status status = table.Apply(Plan(std::string("step: 2 ") + GetParam().plan), &batch);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

#define SAMPLING " sampling { top_p: 1 repetition_penalty: 1 } "
INSTANTIATE_TEST_SUITE_P(
    Rules, BadPlans,
    ::testing::Values(
        BadPlan{"release_slots: 4", "release_slots[0] is 4, there are 4 slots"},
        BadPlan{"release_slots: 2", "release_slots[0] is 2, which holds no sequence"},
        BadPlan{"release_slots: 1 release_slots: 1", "release_slots[1] is 1, which holds no sequence"},
        BadPlan{"release_slots: 1 decode_slots: 1", "decode_slots[0] is 1, which holds no sequence"},
        BadPlan{"start { slot: 4294967295 token_ids: 1" SAMPLING "}", "start[0].slot is 4294967295, there are 4 slots"},
        BadPlan{"start { slot: 1 token_ids: 1" SAMPLING "}", "start[0].slot is 1, which is in use"},
        BadPlan{"start { slot: 2" SAMPLING "}", "start[0].token_ids is empty"},
        BadPlan{"start { slot: 2 token_ids: 3 token_ids: 50" SAMPLING "}",
                "start[0].token_ids[1] is 50, the vocabulary has 50 tokens"},
        BadPlan{"start { slot: 2 token_ids: 3 num_prompt_tokens: 2" SAMPLING "}",
                "start[0].num_prompt_tokens is 2, token_ids has 1 entries"},
        BadPlan{"start { slot: 2 token_ids: 3 page_ids: 10" SAMPLING "}",
                "start[0].page_ids[0] is 10, the pool has 10 pages"},
        BadPlan{"start { slot: 2 token_ids: 3 page_ids: 0 page_ids: 0 page_ids: 0 page_ids: 0 page_ids: 0" SAMPLING "}",
                "start[0].page_ids has 5 entries, a full context has 4 pages"},
        BadPlan{"start { slot: 2 token_ids: 3 num_cached_tokens: 32" SAMPLING "}",
                "start[0].num_cached_tokens is 32, must be a multiple of 64"},
        BadPlan{"start { slot: 2 token_ids: 3 num_cached_tokens: 64 page_ids: 1" SAMPLING "}",
                "start[0].num_cached_tokens is 64, at least one of 1 tokens"},
        BadPlan{"start { slot: 2 token_ids: 3 }", "start[0].sampling is missing"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 temperature: -1 } }",
                "start[0].sampling.temperature is -1, must be finite and at least 0"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 temperature: inf } }",
                "temperature is inf"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 temperature: nan } }",
                "temperature is nan"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { repetition_penalty: 1 } }",
                "top_p is 0, must be above 0 and at most 1"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1.5 repetition_penalty: 1 } }", "top_p is 1.5"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 min_p: -0.5 } }",
                "min_p is -0.5, must be 0..1"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 } }",
                "repetition_penalty is 0, must be finite and above 0"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 presence_penalty: nan } }",
                "presence_penalty is nan"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 frequency_penalty: inf } }",
                "frequency_penalty is inf"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 num_top_logprobs: 21 } }",
                "num_top_logprobs is 21, must be at most 20"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 num_top_prompt_logprobs: "
                "4000000000 } }",
                "num_top_prompt_logprobs is 4"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 suppressed_ids: 50 } }",
                "suppressed_ids[0] is 50, the vocabulary has 50 tokens"},
        BadPlan{"start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 bias_ids: 1 } }",
                "bias_values has 0 entries, bias_ids has 1"},
        BadPlan{
            "start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 bias_ids: 99 bias_values: 1 } }",
            "bias_ids[0] is 99"},
        BadPlan{
            "start { slot: 2 token_ids: 3 sampling { top_p: 1 repetition_penalty: 1 bias_ids: 9 bias_values: nan } }",
            "bias_values is nan"},
        BadPlan{"page_slots: 0", "page_slots has 1 entries, page_ids has 0"},
        BadPlan{"page_slots: 3 page_ids: 1", "page_slots[0] is 3, which holds no sequence"},
        BadPlan{"page_slots: 0 page_ids: 10", "page_ids[0] is 10, the pool has 10 pages"},
        BadPlan{"page_slots: 0 page_ids: 1 page_slots: 0 page_ids: 1 page_slots: 0 page_ids: 1",
                "page_slots[2]: slot 0 already holds the 4 pages of a full context"},
        BadPlan{"prefill { slot: 9 num_tokens: 1 }", "prefill[0].slot is 9, there are 4 slots"},
        BadPlan{"prefill { slot: 0 num_tokens: 0 }",
                "prefill[0].num_tokens is 0, slot 0 has 4 known tokens left to compute"},
        BadPlan{"prefill { slot: 0 num_tokens: 5 }",
                "prefill[0].num_tokens is 5, slot 0 has 4 known tokens left to compute"},
        BadPlan{"prefill { slot: 1 num_tokens: 1 }",
                "prefill[0].num_tokens is 1, slot 1 has 0 known tokens left to compute"},
        BadPlan{"prefill { slot: 0 num_tokens: 3 sample: true }",
                "prefill[0].sample is set, but the chunk ends 1 tokens before"},
        BadPlan{"prefill { slot: 0 num_tokens: 1 } prefill { slot: 0 num_tokens: 1 }",
                "prefill[1].slot is 0, which has rows in this plan already"},
        BadPlan{"decode_slots: 1 decode_slots: 1", "decode_slots[1] is 1, which has rows in this plan already"},
        BadPlan{"decode_slots: 0", "decode_slots[0] is 0, whose prefill has not sampled a token yet"},
        BadPlan{"decode_slots: 3", "decode_slots[0] is 3, which holds no sequence"}));

TEST(SlotTable, RowsPagesAndContextAreLimited) {
  const auto start = [](int64_t tokens, int64_t pages) {
    v1::StepPlan plan = Plan("step: 1 " + StartText("slot: 2"));
    for (int64_t i = 0; i < tokens; ++i) plan.mutable_start(0)->add_token_ids(1);
    for (int64_t i = 0; i < pages; ++i) plan.mutable_start(0)->add_page_ids(static_cast<uint32_t>(i));
    plan.add_prefill()->set_slot(2);
    return plan;
  };
  StepBatch batch;
  SlotTable table(kLimits);
  EXPECT_THAT(std::string(table.Apply(start(257, 4), &batch).message()),
              HasSubstr("start[0].token_ids has 257 entries, the model's context has 256"));
  table.Reset();
  v1::StepPlan plan = start(120, 2);
  plan.mutable_prefill(0)->set_num_tokens(101);
  EXPECT_THAT(std::string(table.Apply(plan, &batch).message()),
              HasSubstr("the plan has at least 101 rows, max_step_tokens is 100"));
  table.Reset();
  plan = start(120, 1);
  plan.mutable_prefill(0)->set_num_tokens(65);
  EXPECT_THAT(std::string(table.Apply(plan, &batch).message()),
              HasSubstr("whose 1 pages hold fewer than the 65 tokens"));

  // Decode up to the last position of the context, and not past it.
  table.Reset();
  plan = start(256, 4);
  plan.mutable_prefill(0)->set_num_tokens(100);
  ASSERT_TRUE(table.Apply(plan, &batch).ok());
  ASSERT_TRUE(table.Apply(Plan("step: 2 prefill { slot: 2 num_tokens: 100 }"), &batch).ok());
  ASSERT_TRUE(table.Apply(Plan("step: 3 prefill { slot: 2 num_tokens: 56 sample: true }"), &batch).ok());
  EXPECT_THAT(std::string(table.Apply(Plan("step: 4 decode_slots: 2"), &batch).message()),
              HasSubstr("would be at position 256, the model's context has 256"));
}

TEST(SlotTable, StepsFollowOneAnother) {
  StepBatch batch;
  SlotTable table(kLimits);
  EXPECT_THAT(std::string(table.Apply(Plan(""), &batch).message()), HasSubstr("step is 0"));
  EXPECT_TRUE(table.Apply(Plan("step: 1"), &batch).ok());
  EXPECT_THAT(std::string(table.Apply(Plan("step: 3"), &batch).message()), HasSubstr("step is 3, must follow 1"));
}

TEST(SlotTable, LaysOutTheRowsOfAPlan) {
  SlotTable table(kLimits);
  Prepare(&table);
  StepBatch batch;
  const absl::Status status =
      table.Apply(Plan("step: 2 " + StartText("slot: 3 token_ids: 11 token_ids: 12 num_prompt_tokens: 2 page_ids: 9") +
                       "page_slots: 0 page_ids: 8 prefill { slot: 0 num_tokens: 4 sample: true } prefill { slot: 3 "
                       "num_tokens: 1 } decode_slots: 1"),
                  &batch);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(batch.token_ids, ElementsAre(66 % 50, 67 % 50, 68 % 50, 69 % 50, 11, ~1));
  EXPECT_THAT(batch.positions, ElementsAre(66, 67, 68, 69, 0, 1));
  EXPECT_THAT(batch.row_sequence, ElementsAre(0, 0, 0, 0, 1, 2));
  EXPECT_THAT(batch.row_begin, ElementsAre(0, 4, 5, 6));
  EXPECT_EQ(batch.max_pages, 3);
  EXPECT_THAT(batch.page_tables, ElementsAre(3, 4, 8, 9, -1, -1, 5, -1, -1));
  EXPECT_THAT(batch.started, ElementsAre(3));
  ASSERT_EQ(batch.logit_rows.size(), 2u);
  EXPECT_EQ(batch.logit_rows[0].row, 3);
  EXPECT_EQ(batch.logit_rows[0].sample.position, 70);
  EXPECT_EQ(batch.logit_rows[0].sample.slot, 0);
  EXPECT_EQ(batch.logit_rows[1].row, 5);
  EXPECT_EQ(batch.logit_rows[1].sample.position, 2);
}

// Whatever bytes parse as a plan: a status, never a crash, and rows within the limits when it is OK.
TEST(SlotTable, RandomPlansNeverCrash) {
  std::mt19937_64 random(11);
  const auto small = [&](uint64_t n) { return static_cast<uint32_t>(random() % 40 == 0 ? random() : random() % n); };
  SlotTable table(kLimits);
  int accepted = 0;
  for (int i = 0; i < 30000; ++i) {
    if (i % 8 == 0) table.Reset();
    v1::StepPlan plan;
    plan.set_step(static_cast<uint64_t>(i % 8 + 1));
    for (uint32_t n = small(2); n > 0 && n < 9; --n) plan.add_release_slots(small(4));
    for (uint32_t n = small(3); n > 0 && n < 9; --n) {
      v1::StartSequence* start = plan.add_start();
      start->set_slot(small(5));
      for (uint32_t t = small(90); t > 0 && t < 200; --t) start->add_token_ids(small(50));
      start->set_num_prompt_tokens(small(2) * static_cast<uint32_t>(start->token_ids_size()));
      for (uint32_t t = small(4); t > 0 && t < 9; --t) start->add_page_ids(small(10));
      start->set_num_cached_tokens(small(5) == 0 ? 64 : 0);
      *start->mutable_sampling() = GreedySampling();
      start->mutable_sampling()->set_prompt_logprobs(small(2) == 0);
    }
    for (uint32_t n = small(3); n > 0 && n < 9; --n) {
      plan.add_page_slots(small(4));
      plan.add_page_ids(small(10));
    }
    for (uint32_t n = small(3); n > 0 && n < 9; --n) {
      v1::PrefillChunk* chunk = plan.add_prefill();
      chunk->set_slot(small(4));
      chunk->set_num_tokens(small(60));
      chunk->set_sample(small(2) == 0);
    }
    for (uint32_t n = small(3); n > 0 && n < 9; --n) plan.add_decode_slots(small(4));
    StepBatch batch;
    const absl::Status status = table.Apply(plan, &batch);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      table.Reset();
      continue;
    }
    ++accepted;
    ASSERT_LE(batch.rows(), kLimits.max_step_tokens);
    ASSERT_EQ(batch.positions.size(), batch.token_ids.size());
    ASSERT_EQ(batch.row_begin.back(), batch.rows());
    ASSERT_EQ(static_cast<int64_t>(batch.page_tables.size()), batch.sequences() * batch.max_pages);
    for (int64_t row = 0; row < batch.rows(); ++row) {
      const int64_t page = batch.row_sequence[static_cast<size_t>(row)] * batch.max_pages +
                           batch.positions[static_cast<size_t>(row)] / kPageTokens;
      ASSERT_GE(batch.page_tables[static_cast<size_t>(page)], 0) << "every row's page exists";
    }
  }
  EXPECT_GT(accepted, 300);
}

TEST(Engine, NeedsAResetAfterABadPlan) {
  Rig rig({});
  Engine& engine = rig.group().engine(0);
  v1::StepResult result;
  EXPECT_EQ(engine.Execute(Plan("step: 1 decode_slots: 0"), &result).code(), absl::StatusCode::kInvalidArgument);
  const absl::Status again = engine.Execute(Plan("step: 2"), &result);
  EXPECT_EQ(again.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(again.message()), HasSubstr("needs a Reset"));
  engine.Reset();
  EXPECT_TRUE(engine.Execute(Plan("step: 1"), &result).ok()) << "a plan without rows is a plan";
  EXPECT_EQ(result.step(), 1u);
  EXPECT_EQ(result.token_ids_size(), 0);
}

}  // namespace
}  // namespace nibble::testing
