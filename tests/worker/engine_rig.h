// An engine on a small random model, and plans for it: what the engine tests share. A Driver is a miniature router: it
// owns slots and pages and speaks in plans.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "common/model/checkpoint.h"
#include "tests/model/tiny_model.h"
#include "tools/eval/engine_group.h"

namespace nibble::testing {

struct RigOptions {
  TinyModel model;
  int world_size = 1;
  int threads_per_rank = 1;
  int64_t max_sequences = 8;
  int64_t max_step_tokens = 512;
  int64_t pages = 64;
};

class Rig {
 public:
  explicit Rig(const RigOptions& options) {
    const std::string dir = dir_ / "model";
    NIBBLE_CHECK(WriteTinyModel(options.model, dir).ok());
    auto checkpoint = Checkpoint::Open(dir);
    NIBBLE_CHECK(checkpoint.ok(), checkpoint.status().ToString());
    checkpoint_ = *std::move(checkpoint);
    const ModelConfig& config = checkpoint_->config();
    const KvLayout layout = {.format = config.quantization == Quantization::kBF16 ? KvFormat::kF32 : KvFormat::kKV4,
                             .kv_heads = config.num_kv_heads / options.world_size,
                             .head_dim = config.head_dim};
    auto group = EngineGroup::Create(
        *checkpoint_, {.world_size = options.world_size,
                       .threads_per_rank = options.threads_per_rank,
                       .limits = {.kv_memory_bytes = options.pages * layout.page_bytes() * config.num_layers,
                                  .max_sequences = options.max_sequences,
                                  .max_step_tokens = options.max_step_tokens}});
    NIBBLE_CHECK(group.ok(), group.status().ToString());
    group_ = *std::move(group);
  }
  EngineGroup& group() { return *group_; }
  const ModelConfig& config() const { return checkpoint_->config(); }

 private:
  TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<EngineGroup> group_;
};

inline v1::StepSampling GreedySampling() {
  v1::StepSampling sampling;
  sampling.set_top_p(1);
  sampling.set_repetition_penalty(1);
  sampling.set_logprobs(true);
  sampling.set_num_top_logprobs(3);
  return sampling;
}

struct Sequence {
  std::vector<uint32_t> token_ids;  // known at the start
  int64_t num_prompt_tokens = 0;    // 0: all of them
  v1::StepSampling sampling = GreedySampling();
};

// What a sequence gave, bit for bit.
struct Output {
  std::vector<uint32_t> token_ids;
  std::vector<float> logprobs;
  std::vector<std::vector<uint32_t>> top_ids;
  std::vector<float> prompt_logprobs;
  bool operator==(const Output&) const = default;
};

class Driver {
 public:
  explicit Driver(Rig& rig) : group_(rig.group()) {
    group_.Reset();
    for (int64_t p = group_.num_pages() - 1; p >= 0; --p) free_pages_.push_back(static_cast<uint32_t>(p));
  }

  // cached_pages: leading pages taken over from another sequence.
  void Start(uint32_t slot, const Sequence& sequence, const std::vector<uint32_t>& cached_pages = {}) {
    State state{
        .sequence = sequence, .cached = static_cast<int64_t>(cached_pages.size()) * kPageTokens, .pages = cached_pages};
    v1::StartSequence* start = plan_.add_start();
    start->set_slot(slot);
    start->mutable_token_ids()->Add(sequence.token_ids.begin(), sequence.token_ids.end());
    start->set_num_prompt_tokens(static_cast<uint32_t>(
        sequence.num_prompt_tokens > 0 ? sequence.num_prompt_tokens : static_cast<int64_t>(sequence.token_ids.size())));
    start->set_num_cached_tokens(static_cast<uint32_t>(state.cached));
    start->mutable_page_ids()->Add(cached_pages.begin(), cached_pages.end());
    *start->mutable_sampling() = sequence.sampling;
    states_[slot] = std::move(state);
  }
  void Release(uint32_t slot) {
    plan_.add_release_slots(slot);
    states_.erase(slot);
  }
  // The next tokens of a slot; samples when they are the last ones.
  void Prefill(uint32_t slot, int64_t count) {
    State& state = states_.at(slot);
    const int64_t left = static_cast<int64_t>(state.sequence.token_ids.size()) - state.cached;
    v1::PrefillChunk* chunk = plan_.add_prefill();
    chunk->set_slot(slot);
    chunk->set_num_tokens(static_cast<uint32_t>(std::min(count, left)));
    chunk->set_sample(count >= left);
    Grow(slot, std::min(count, left));
    if (count >= left) order_.push_back(slot);
  }
  void Decode(uint32_t slot) {
    plan_.add_decode_slots(slot);
    Grow(slot, 1);
    decode_order_.push_back(slot);
  }
  bool prefilling(uint32_t slot) const {
    const State& state = states_.at(slot);
    return state.cached < static_cast<int64_t>(state.sequence.token_ids.size());
  }
  const std::vector<uint32_t>& pages(uint32_t slot) const { return states_.at(slot).pages; }
  const Output& output(uint32_t slot) { return outputs_[slot]; }
  void ClearOutput(uint32_t slot) { outputs_.erase(slot); }

  void Step() {
    plan_.set_step(++step_);
    order_.insert(order_.end(), decode_order_.begin(), decode_order_.end());
    const auto result = group_.Execute(plan_);
    NIBBLE_CHECK(result.ok(), result.status().ToString());
    NIBBLE_CHECK_EQ(result->token_ids_size(), static_cast<int>(order_.size()));
    for (size_t i = 0; i < order_.size(); ++i)
      outputs_[order_[i]].token_ids.push_back(result->token_ids(static_cast<int>(i)));
    for (const v1::RowLogprobs& row : result->logprobs()) {
      outputs_[row.slot()].logprobs.push_back(row.logprob());
      outputs_[row.slot()].top_ids.emplace_back(row.top_ids().begin(), row.top_ids().end());
    }
    for (const v1::RowLogprobs& row : result->prompt_logprobs())
      outputs_[row.slot()].prompt_logprobs.push_back(row.logprob());
    plan_.Clear();
    order_.clear();
    decode_order_.clear();
  }

  // A sequence from start to `count` tokens, alone, in chunks.
  Output Run(uint32_t slot, const Sequence& sequence, int64_t count, int64_t chunk) {
    ClearOutput(slot);
    Start(slot, sequence);
    while (prefilling(slot)) {
      Prefill(slot, chunk);
      Step();
    }
    while (static_cast<int64_t>(output(slot).token_ids.size()) < count) {
      Decode(slot);
      Step();
    }
    Free(slot);
    return output(slot);
  }
  void Free(uint32_t slot) {
    for (const uint32_t page : states_.at(slot).pages) free_pages_.push_back(page);
    Release(slot);
  }

 private:
  struct State {
    Sequence sequence;
    int64_t cached = 0;
    std::vector<uint32_t> pages;
  };
  void Grow(uint32_t slot, int64_t tokens) {
    State& state = states_.at(slot);
    state.cached += tokens;
    while (static_cast<int64_t>(state.pages.size()) * kPageTokens < state.cached) {
      NIBBLE_CHECK(!free_pages_.empty(), "the test needs more pages");
      state.pages.push_back(free_pages_.back());
      plan_.add_page_slots(slot);
      plan_.add_page_ids(free_pages_.back());
      free_pages_.pop_back();
    }
  }

  EngineGroup& group_;
  uint64_t step_ = 0;
  v1::StepPlan plan_;
  std::vector<uint32_t> order_, decode_order_;  // slots that sample in the plan being written
  std::vector<uint32_t> free_pages_;
  std::map<uint32_t, State> states_;
  std::map<uint32_t, Output> outputs_;
};

// A prompt of n tokens, different for every seed.
inline Sequence RandomSequence(uint64_t seed, int64_t n, int64_t vocab_size) {
  std::mt19937_64 random(seed);
  Sequence sequence;
  for (int64_t i = 0; i < n; ++i)
    sequence.token_ids.push_back(static_cast<uint32_t>(random() % static_cast<uint64_t>(vocab_size)));
  return sequence;
}

}  // namespace nibble::testing
