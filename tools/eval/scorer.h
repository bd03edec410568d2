// Log-probabilities of known texts, through the engine: many sequences at a time as prefill chunks with
// prompt_logprobs.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/eval/engine_group.h"

namespace nibble {

struct TokenScore {
  uint32_t token_id = 0;
  float logprob = 0;
  std::vector<uint32_t> top_ids;  // best first, as many as asked for
  std::vector<float> top_logprobs;
};

// Rows of one step; enough to keep the cores busy, little enough to keep a step's activations small.
inline constexpr int64_t kScoreStepTokens = 2048;

// What an EngineGroup needs to score sequences of up to max_tokens tokens in steps of up to step_tokens rows.
EngineLimits ScoringLimits(const ModelConfig& config, int world_size, int64_t max_tokens,
                           int64_t step_tokens = kScoreStepTokens);

// Plans that read `sequences` through an engine from Reset on, in order: as many sequences at a time as num_pages and
// step_tokens rows hold, a longer one alone in several chunks. `step` executes one plan; its slot s is sequence
// first + s, and the plan's logit rows are the scored tokens, slot by slot. `finished` counts the sequences complete
// after it. INVALID_ARGUMENT for a sequence of fewer than 2 tokens, or what step returns.
struct ScoringStep {
  const v1::StepPlan& plan;
  size_t first;
  int64_t finished;
};
absl::Status ForEachScoringStep(std::span<const std::vector<uint32_t>> sequences, int64_t step_tokens,
                                int64_t num_pages, uint32_t num_top_logprobs,
                                const std::function<absl::Status(const ScoringStep&)>& step);

// scores[i][j] is of sequences[i][j + 1], given the tokens before it. done (may be null) hears how many sequences each
// step finished.
absl::StatusOr<std::vector<std::vector<TokenScore>>> Score(EngineGroup& group,
                                                           std::span<const std::vector<uint32_t>> sequences,
                                                           uint32_t num_top_logprobs,
                                                           const std::function<void(int64_t finished)>& done = {});

}  // namespace nibble
