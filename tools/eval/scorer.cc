#include "tools/eval/scorer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "kernels/ops.h"

namespace nibble {
namespace {

int64_t PagesFor(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// The last token of a sequence is scored, never read.
int64_t RowsOf(const std::vector<uint32_t>& sequence) { return static_cast<int64_t>(sequence.size()) - 1; }

v1::StepSampling ScoringParameters(uint32_t num_top_logprobs) {
  v1::StepSampling sampling;
  sampling.set_top_p(1);
  sampling.set_repetition_penalty(1);
  sampling.set_prompt_logprobs(true);
  sampling.set_num_top_prompt_logprobs(num_top_logprobs);
  return sampling;
}

}  // namespace

EngineLimits ScoringLimits(const ModelConfig& config, int world_size, int64_t max_tokens, int64_t step_tokens) {
  const int64_t sequences = std::max<int64_t>(1, step_tokens / std::max<int64_t>(1, max_tokens - 1));
  const KvLayout layout = {.format = config.quantization == Quantization::kBF16 ? KvFormat::kF32 : KvFormat::kKV4,
                           .kv_heads = std::max<int64_t>(1, config.num_kv_heads / world_size),
                           .head_dim = config.head_dim};
  return {.kv_memory_bytes = sequences * PagesFor(max_tokens) * layout.page_bytes() * config.num_layers,
          .max_sequences = sequences,
          .max_step_tokens = step_tokens};
}

absl::Status ForEachScoringStep(std::span<const std::vector<uint32_t>> sequences, int64_t step_tokens,
                                int64_t num_pages, uint32_t num_top_logprobs,
                                const std::function<absl::Status(const ScoringStep&)>& step) {
  uint64_t steps = 0;
  std::vector<uint32_t> release;
  for (size_t begin = 0; begin < sequences.size();) {
    size_t end = begin;
    int64_t rows = 0, pages = 0;
    while (end < sequences.size()) {
      if (RowsOf(sequences[end]) < 1)
        return absl::InvalidArgumentError(absl::StrCat("sequence ", end, " has fewer than 2 tokens"));
      const int64_t more_rows = RowsOf(sequences[end]), more_pages = PagesFor(more_rows);
      if (end > begin && (rows + more_rows > step_tokens || pages + more_pages > num_pages)) break;
      rows += more_rows;
      pages += more_pages;
      ++end;
    }

    v1::StepPlan first;
    first.mutable_release_slots()->Add(release.begin(), release.end());
    release.clear();
    uint32_t page = 0;
    for (size_t i = begin; i < end; ++i) {
      v1::StartSequence* start = first.add_start();
      const uint32_t slot = static_cast<uint32_t>(i - begin);
      start->set_slot(slot);
      start->mutable_token_ids()->Add(sequences[i].begin(), sequences[i].end());
      start->set_num_prompt_tokens(static_cast<uint32_t>(sequences[i].size()));
      for (int64_t p = PagesFor(RowsOf(sequences[i])); p > 0; --p) start->add_page_ids(page++);
      *start->mutable_sampling() = ScoringParameters(num_top_logprobs);
      release.push_back(slot);
    }
    for (int64_t at = 0; at < rows; at += step_tokens) {
      v1::StepPlan plan;
      if (at == 0) plan.Swap(&first);
      plan.set_step(++steps);
      for (size_t i = begin; i < end; ++i) {
        v1::PrefillChunk* chunk = plan.add_prefill();
        chunk->set_slot(static_cast<uint32_t>(i - begin));
        chunk->set_num_tokens(static_cast<uint32_t>(std::min(RowsOf(sequences[i]) - at, step_tokens)));
      }
      const int64_t finished = at + step_tokens < rows ? 0 : static_cast<int64_t>(end - begin);
      NIBBLE_RETURN_IF_ERROR(step({.plan = plan, .first = begin, .finished = finished}));
    }
    begin = end;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::vector<TokenScore>>> Score(EngineGroup& group,
                                                           std::span<const std::vector<uint32_t>> sequences,
                                                           uint32_t num_top_logprobs,
                                                           const std::function<void(int64_t finished)>& done) {
  std::vector<std::vector<TokenScore>> scores(sequences.size());
  group.Reset();
  NIBBLE_RETURN_IF_ERROR(ForEachScoringStep(
      sequences, kScoreStepTokens, group.num_pages(), num_top_logprobs, [&](const ScoringStep& step) -> absl::Status {
        NIBBLE_ASSIGN_OR_RETURN(const v1::StepResult result, group.Execute(step.plan));
        for (const v1::RowLogprobs& row : result.prompt_logprobs()) {
          scores[step.first + row.slot()].push_back(
              {.token_id = row.token_id(),
               .logprob = row.logprob(),
               .top_ids = {row.top_ids().begin(), row.top_ids().end()},
               .top_logprobs = {row.top_logprobs().begin(), row.top_logprobs().end()}});
        }
        if (done && step.finished > 0) done(step.finished);
        return absl::OkStatus();
      }));
  for (size_t i = 0; i < scores.size(); ++i) {
    if (static_cast<int64_t>(scores[i].size()) != RowsOf(sequences[i])) {
      return absl::InternalError(
          absl::StrCat("sequence ", i, " has ", scores[i].size(), " scores, expected ", RowsOf(sequences[i])));
    }
  }
  return scores;
}

}  // namespace nibble
