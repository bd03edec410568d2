// Golden prompts: continuations and their log-probabilities, computed outside this project (the model card says how),
// against what the engine makes of them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/eval/engine_group.h"

namespace nibble {

struct GoldenPrompt {
  std::string prompt;
  std::vector<uint32_t> prompt_ids;
  std::vector<uint32_t> greedy_ids;
  std::vector<float> greedy_logprobs;                  // of greedy_ids
  std::vector<std::pair<uint32_t, float>> top_logits;  // after the prompt, best first
};

// INVALID_ARGUMENT with file and reason when the file is not what README.md of the model describes.
absl::StatusOr<std::vector<GoldenPrompt>> LoadGolden(const std::string& path);

struct GoldenReport {
  std::string prompt;
  int64_t tokens = 0;
  double max_logprob_error = 0;  // over the golden tokens, teacher-forced
  double max_logit_error =
      0;  // of the five best after the prompt, as differences to the best; infinite when others are best
  int64_t best_tokens = 0;  // positions whose golden token is the engine's best; for information: continuations written
                            // by another program need not be this model's own greedy ones

  bool Passed(double tolerance) const { return max_logprob_error <= tolerance && max_logit_error <= tolerance; }
};

absl::StatusOr<std::vector<GoldenReport>> CompareGolden(EngineGroup& group, const std::vector<GoldenPrompt>& prompts);

// A table for people, one line per prompt.
std::string FormatGolden(const std::vector<GoldenReport>& reports, double tolerance);

}  // namespace nibble
