#include "tools/eval/golden.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"
#include "tools/eval/scorer.h"

namespace nibble {
namespace {

constexpr uint32_t kTopLogprobs = 5;
constexpr int64_t kMaxGoldenBytes = int64_t{64} << 20;

// log-probability of a token among the five best of a position, if it is one of them.
std::optional<float> TopLogprob(const TokenScore& score, uint32_t id) {
  for (size_t k = 0; k < score.top_ids.size(); ++k) {
    if (score.top_ids[k] == id) return score.top_logprobs[k];
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<std::vector<GoldenPrompt>> LoadGolden(const std::string& path) {
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxGoldenBytes));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::vector<GoldenPrompt> prompts;
  try {
    for (const nlohmann::json& entry : json.at("prompts")) {
      GoldenPrompt golden;
      golden.prompt = entry.at("prompt").get<std::string>();
      golden.prompt_ids = entry.at("prompt_ids").get<std::vector<uint32_t>>();
      golden.greedy_ids = entry.at("greedy_ids").get<std::vector<uint32_t>>();
      golden.greedy_logprobs = entry.at("greedy_logprobs").get<std::vector<float>>();
      golden.top_logits = entry.at("last_prompt_logits_top5").get<std::vector<std::pair<uint32_t, float>>>();
      if (golden.prompt_ids.empty() || golden.greedy_ids.empty() ||
          golden.greedy_ids.size() != golden.greedy_logprobs.size() || golden.top_logits.empty() ||
          golden.top_logits.size() > kTopLogprobs) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": prompt ", prompts.size(), " has lists of the wrong length"));
      }
      prompts.push_back(std::move(golden));
    }
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": prompt ", prompts.size(), ": ", e.what()));
  }
  if (prompts.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": prompts is empty"));
  return prompts;
}

absl::StatusOr<std::vector<GoldenReport>> CompareGolden(EngineGroup& group, const std::vector<GoldenPrompt>& prompts) {
  std::vector<std::vector<uint32_t>> sequences;
  for (const GoldenPrompt& golden : prompts) {
    sequences.push_back(golden.prompt_ids);
    sequences.back().insert(sequences.back().end(), golden.greedy_ids.begin(), golden.greedy_ids.end());
  }
  NIBBLE_ASSIGN_OR_RETURN(const auto scores, Score(group, sequences, kTopLogprobs));
  std::vector<GoldenReport> reports;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const GoldenPrompt& golden = prompts[i];
    const size_t first = golden.prompt_ids.size() - 1;  // the score of the first generated token
    GoldenReport report{.prompt = golden.prompt, .tokens = static_cast<int64_t>(golden.greedy_ids.size())};
    for (size_t j = 0; j < golden.greedy_ids.size(); ++j) {
      const TokenScore& score = scores[i][first + j];
      report.max_logprob_error =
          std::max(report.max_logprob_error, std::abs(double{score.logprob} - golden.greedy_logprobs[j]));
      report.best_tokens += score.top_ids[0] == score.token_id;
    }
    const auto best = TopLogprob(scores[i][first], golden.top_logits[0].first);
    for (const auto& [id, logit] : golden.top_logits) {
      const auto logprob = TopLogprob(scores[i][first], id);
      const double error = best && logprob
                               ? std::abs((*logprob - *best) - (double{logit} - golden.top_logits[0].second))
                               : std::numeric_limits<double>::infinity();
      report.max_logit_error = std::max(report.max_logit_error, error);
    }
    reports.push_back(report);
  }
  return reports;
}

std::string FormatGolden(const std::vector<GoldenReport>& reports, double tolerance) {
  std::string table =
      absl::StrFormat("%-34s %6s %5s %14s %12s\n", "prompt", "tokens", "best", "logprob error", "logit error");
  for (const GoldenReport& r : reports) {
    std::string prompt = r.prompt.substr(0, 34);
    std::replace(prompt.begin(), prompt.end(), '\n', ' ');
    absl::StrAppendFormat(&table, "%-34s %6d %5d %14.5f %12.5f  %s\n", prompt, r.tokens, r.best_tokens,
                          r.max_logprob_error, r.max_logit_error, r.Passed(tolerance) ? "ok" : "FAILED");
  }
  return table;
}

}  // namespace nibble
