// How far a model's next-token distributions are from a reference's, over whole vocabularies: both engines read the same
// plans in turn, and what Ops::Sample is given is compared row by row.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "tools/eval/engine_group.h"

namespace nibble {

// Σ p ln(p / q) in nats for p = softmax(reference), q = softmax(model), both [V] logits.
double KlDivergence(std::span<const float> reference, std::span<const float> model);

struct DivergenceReport {
  int64_t tokens = 0;
  double mean_kl = 0;  // nats per token
  double p99_kl = 0;
  double top1_agreement = 0;  // share of positions where both find the same token most likely
  double perplexity = 0;      // of the model
  double reference_perplexity = 0;
};

// Where an engine's logits come out: wrap_ops of an EngineGroup whose rank 0 is listened to.
class LogitsTap {
 public:
  // rows of [V] logits, host memory, in the order of the plan's logit rows; several calls make a step.
  using Listener = std::function<void(std::span<const float> logits, int64_t vocab)>;
  std::unique_ptr<Ops> Wrap(int rank, std::unique_ptr<Ops> backend);
  void SetListener(Listener listener) { listener_ = std::move(listener); }

 private:
  class TappedOps;
  Listener listener_;
};

// Rows of a step such that one step's logits of the model fit the memory set aside for them.
int64_t DivergenceStepTokens(int64_t vocab_size);

// Both groups have limits of ScoringLimits(.., DivergenceStepTokens(V)) and Ops wrapped by their tap, and
// vocabularies of one size. done hears how many sequences each step finished.
struct TappedGroup {
  EngineGroup& group;
  LogitsTap& tap;
};
absl::StatusOr<DivergenceReport> CompareDistributions(const TappedGroup& model, const TappedGroup& reference,
                                                      std::span<const std::vector<uint32_t>> sequences,
                                                      int64_t vocab_size, int threads,
                                                      const std::function<void(int64_t finished)>& done);

}  // namespace nibble
