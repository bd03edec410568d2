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

// What an EngineGroup needs to score sequences of up to max_tokens tokens.
EngineLimits ScoringLimits(const ModelConfig& config, int world_size, int64_t max_tokens);

// scores[i][j] is of sequences[i][j + 1], given the tokens before it. done (may be null) hears of every finished
// sequence.
absl::StatusOr<std::vector<std::vector<TokenScore>>> Score(EngineGroup& group,
                                                           std::span<const std::vector<uint32_t>> sequences,
                                                           uint32_t num_top_logprobs,
                                                           const std::function<void()>& done = {});

}  // namespace nibble
