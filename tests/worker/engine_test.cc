// The engine's promise: a sequence's tokens and log-probabilities do not depend on how it was cut into steps, what else
// was in them, which pages were reused, or whether it was replayed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/engine_rig.h"

namespace nibble::testing {
namespace {

constexpr int64_t kOutputTokens = 12;

std::string ModeName(const ::testing::TestParamInfo<Quantization>& mode) { return QuantizationName(mode.param); }

class Engines : public ::testing::TestWithParam<Quantization> {
 protected:
  RigOptions Options() const {
    RigOptions options;
    options.model.quantization = GetParam();
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, Engines,
                         ::testing::Values(Quantization::kBF16, Quantization::kW4A8KV4, Quantization::kW4A4KV4),
                         ModeName);

TEST_P(Engines, ChunksDoNotMatter) {
  Rig rig(Options());
  Driver driver(rig);
  Sequence sequence = RandomSequence(1, 150, rig.config().vocab_size);
  sequence.sampling.set_prompt_logprobs(true);
  const Output whole = driver.Run(0, sequence, kOutputTokens, 512);
  ASSERT_EQ(whole.token_ids.size(), static_cast<size_t>(kOutputTokens));
  ASSERT_EQ(whole.prompt_logprobs.size(), 149u);
  for (const int64_t chunk : {1, 7, 16, 64, 65, 149}) {
    EXPECT_EQ(driver.Run(3, sequence, kOutputTokens, chunk), whole) << "chunk " << chunk;
  }
}

TEST_P(Engines, CompanyDoesNotMatter) {
  Rig rig(Options());
  std::vector<Sequence> sequences;
  for (int i = 0; i < 6; ++i) {
    sequences.push_back(RandomSequence(100 + i, 5 + 23 * i, rig.config().vocab_size));
    if (i % 2 == 1) {  // seeded sampling and penalties too
      sequences.back().sampling.set_temperature(0.9f);
      sequences.back().sampling.set_top_k(40);
      sequences.back().sampling.set_top_p(0.95f);
      sequences.back().sampling.set_seed(77 + i);
      sequences.back().sampling.set_repetition_penalty(1.1f);
    }
  }
  std::vector<Output> alone;
  for (const Sequence& sequence : sequences) {
    Driver driver(rig);
    alone.push_back(driver.Run(2, sequence, kOutputTokens, 512));
  }

  // All of them at once, each beginning a step later, prefill chunks of 10 beside the others' decode rows.
  Driver driver(rig);
  for (int step = 0; step < 60; ++step) {
    if (step < 6) driver.Start(static_cast<uint32_t>(step), sequences[step]);
    const uint32_t started = static_cast<uint32_t>(std::min(step + 1, 6));
    for (uint32_t slot = 0; slot < started; ++slot) {
      if (driver.prefilling(slot)) {
        driver.Prefill(slot, 10);
      } else if (driver.output(slot).token_ids.size() < kOutputTokens) {
        driver.Decode(slot);
      }
    }
    driver.Step();
  }
  for (uint32_t slot = 0; slot < 6; ++slot) EXPECT_EQ(driver.output(slot), alone[slot]) << "sequence " << slot;
}

TEST_P(Engines, ReusedPagesGiveTheSameTokens) {
  Rig rig(Options());
  Driver driver(rig);
  const Sequence sequence = RandomSequence(5, 200, rig.config().vocab_size);
  driver.Start(0, sequence);
  driver.Prefill(0, 512);
  driver.Step();
  for (int64_t i = 1; i < kOutputTokens; ++i) {
    driver.Decode(0);
    driver.Step();
  }
  // Three full pages (192 tokens) of the first sequence serve the second while the first still lives, and after.
  const std::vector<uint32_t> prefix(driver.pages(0).begin(), driver.pages(0).begin() + 3);
  for (const bool alive : {true, false}) {
    if (!alive) driver.Release(0);
    driver.Start(1, sequence, prefix);
    driver.Prefill(1, 512);
    driver.Step();
    for (int64_t i = 1; i < kOutputTokens; ++i) {
      driver.Decode(1);
      driver.Step();
    }
    if (alive) {
      EXPECT_EQ(driver.output(1), driver.output(0));
    } else {
      Output twice = driver.output(0);
      EXPECT_EQ(
          std::vector<uint32_t>(driver.output(1).token_ids.begin() + kOutputTokens, driver.output(1).token_ids.end()),
          twice.token_ids);
    }
    driver.Release(1);
  }
}

TEST_P(Engines, ReplayContinuesAsIfNothingHappened) {
  Rig rig(Options());
  Driver driver(rig);
  for (const float temperature : {0.0f, 1.0f}) {
    Sequence sequence = RandomSequence(9, 70, rig.config().vocab_size);
    sequence.sampling.set_temperature(temperature);
    sequence.sampling.set_seed(4);
    sequence.sampling.set_frequency_penalty(0.5f);
    sequence.sampling.set_presence_penalty(0.2f);
    sequence.sampling.set_min_tokens(9);
    sequence.sampling.add_suppressed_ids(1);
    const Output whole = driver.Run(0, sequence, kOutputTokens, 512);
    for (const int64_t survived : {1, 5, 11}) {
      Sequence replay = sequence;
      replay.num_prompt_tokens = 70;
      replay.token_ids.insert(replay.token_ids.end(), whole.token_ids.begin(), whole.token_ids.begin() + survived);
      Output expected = whole;
      expected.token_ids.erase(expected.token_ids.begin(), expected.token_ids.begin() + survived);
      expected.logprobs.erase(expected.logprobs.begin(), expected.logprobs.begin() + survived);
      expected.top_ids.erase(expected.top_ids.begin(), expected.top_ids.begin() + survived);
      EXPECT_EQ(driver.Run(1, replay, kOutputTokens - survived, 30), expected)
          << "temperature " << temperature << ", survived " << survived;
    }
  }
}

TEST_P(Engines, ThreadsDoNotMatter) {
  RigOptions options = Options();
  Rig one(options);
  options.threads_per_rank = 3;
  Rig three(options);
  const Sequence sequence = RandomSequence(21, 130, one.config().vocab_size);
  EXPECT_EQ(Driver(one).Run(0, sequence, kOutputTokens, 100), Driver(three).Run(0, sequence, kOutputTokens, 100));
}

TEST_P(Engines, SlotsAreUsedAgain) {
  Rig rig(Options());
  Driver driver(rig);
  const Sequence a = RandomSequence(31, 40, rig.config().vocab_size),
                 b = RandomSequence(32, 90, rig.config().vocab_size);
  const Output first_a = driver.Run(0, a, 4, 512), first_b = driver.Run(0, b, 4, 512);
  EXPECT_NE(first_a, first_b);
  EXPECT_EQ(driver.Run(0, a, 4, 512), first_a) << "a slot remembers nothing";
  EXPECT_EQ(Driver(rig).Run(0, b, 4, 512), first_b) << "neither does an engine after Reset";
}

TEST(Engine, PromptLogprobsAreTheSampledTokensLogprobs) {
  RigOptions options;
  options.model.quantization = Quantization::kW4A4KV4;
  Rig rig(options);
  Driver driver(rig);
  const Sequence sequence = RandomSequence(41, 33, rig.config().vocab_size);
  const Output generated = driver.Run(0, sequence, kOutputTokens, 512);
  // The same tokens as a prompt: scored at prefill with the bits that decode gave.
  Sequence known = sequence;
  known.token_ids.insert(known.token_ids.end(), generated.token_ids.begin(), generated.token_ids.end());
  known.sampling.set_prompt_logprobs(true);
  const Output scored = driver.Run(0, known, 1, 512);
  ASSERT_EQ(scored.prompt_logprobs.size(), known.token_ids.size() - 1);
  EXPECT_EQ(std::vector<float>(scored.prompt_logprobs.begin() + 32, scored.prompt_logprobs.end()), generated.logprobs);
}

TEST(Engine, MoreLogitRowsThanOneBatchOfThem) {
  RigOptions options;
  options.max_step_tokens = 700;
  Rig rig(options);
  Driver driver(rig);
  Sequence sequence = RandomSequence(43, 600, rig.config().vocab_size);
  sequence.sampling.set_prompt_logprobs(true);
  const Output whole = driver.Run(0, sequence, 2, 700);
  ASSERT_EQ(whole.prompt_logprobs.size(), 599u);
  EXPECT_EQ(driver.Run(0, sequence, 2, 50), whole);
}

TEST(Engine, SuppressedBiasedAndPenalizedTokens) {
  Rig rig({});
  Driver driver(rig);
  const Sequence plain = RandomSequence(51, 20, rig.config().vocab_size);
  const Output free = driver.Run(0, plain, 3, 512);

  Sequence suppressed = plain;
  suppressed.sampling.set_min_tokens(2);
  for (const uint32_t id : free.token_ids) suppressed.sampling.add_suppressed_ids(id);
  const Output without = driver.Run(0, suppressed, 3, 512);
  for (int i = 0; i < 2; ++i) EXPECT_THAT(free.token_ids, ::testing::Not(::testing::Contains(without.token_ids[i])));

  Sequence biased = plain;
  biased.sampling.add_bias_ids(123);
  biased.sampling.add_bias_values(100);
  EXPECT_THAT(driver.Run(0, biased, 3, 512).token_ids, ::testing::ElementsAre(123, 123, 123));
  biased.sampling.set_frequency_penalty(99);
  EXPECT_THAT(driver.Run(0, biased, 3, 512).token_ids, ::testing::ElementsAre(123, ::testing::_, ::testing::_));
  EXPECT_NE(driver.Run(0, biased, 3, 512).token_ids[2], 123u) << "two counted outputs outweigh the bias";
}

TEST(Engine, EveryArchitectureVariantRuns) {
  std::vector<TinyModel> models(4);
  models[0].llama3_rope = true;
  models[1].tie_word_embeddings = true;
  models[2].attention_bias = true;
  models[3].architecture = "Qwen2ForCausalLM";
  for (const TinyModel& model : models) {
    RigOptions options;
    options.model = model;
    Rig one(options);
    options.world_size = 2;
    Rig two(options);
    const Sequence sequence = RandomSequence(61, 50, one.config().vocab_size);
    const Output a = Driver(one).Run(0, sequence, 4, 512), b = Driver(two).Run(0, sequence, 4, 512);
    EXPECT_EQ(a.token_ids, b.token_ids);
    for (size_t i = 0; i < a.logprobs.size(); ++i) EXPECT_NEAR(a.logprobs[i], b.logprobs[i], 1e-4);
  }
}

TEST(Engine, LimitsOutOfRange) {
  Rig rig({});  // for its model directory
  auto group = [&](EngineLimits limits) {
    TempDir dir;
    NIBBLE_CHECK(WriteTinyModel({}, dir / "m").ok());
    const auto checkpoint = Checkpoint::Open(dir / "m");
    return EngineGroup::Create(**checkpoint, {.limits = limits}).status();
  };
  EXPECT_EQ(group({.kv_memory_bytes = 1000, .max_sequences = 1, .max_step_tokens = 1}).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(group({.kv_memory_bytes = 0, .max_sequences = 1, .max_step_tokens = 1}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(group({.kv_memory_bytes = 1 << 24, .max_sequences = 0, .max_step_tokens = 1}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(group({.kv_memory_bytes = 1 << 24, .max_sequences = 1, .max_step_tokens = -5}).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nibble::testing
