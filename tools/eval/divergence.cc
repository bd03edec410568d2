#include "tools/eval/divergence.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/base/thread_pool.h"
#include "tools/eval/forwarding_ops.h"
#include "tools/eval/scorer.h"

namespace nibble {
namespace {

constexpr int64_t kLogitBytes = int64_t{256} << 20;  // of the model's logits of one step
constexpr int64_t kMinStepTokens = 64;

double LogProb(const v1::StepResult& result) {
  double sum = 0;
  for (const v1::RowLogprobs& row : result.prompt_logprobs()) sum += static_cast<double>(row.logprob());
  return sum;
}

}  // namespace

// In one pass over each row, with a = reference, b = model, e = exp(a - max a):
// KL = Σ e (a - b) / Σ e - log Σ exp(a) + log Σ exp(b).
double KlDivergence(std::span<const float> reference, std::span<const float> model) {
  NIBBLE_CHECK(!reference.empty() && reference.size() == model.size());
  const float reference_max = *std::ranges::max_element(reference), model_max = *std::ranges::max_element(model);
  double reference_sum = 0, model_sum = 0, weighted = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double e = static_cast<double>(std::exp(reference[i] - reference_max));
    reference_sum += e;
    weighted += e * (static_cast<double>(reference[i]) - static_cast<double>(model[i]));
    model_sum += static_cast<double>(std::exp(model[i] - model_max));
  }
  const double kl = weighted / reference_sum - (static_cast<double>(reference_max) + std::log(reference_sum)) +
                    (static_cast<double>(model_max) + std::log(model_sum));
  return std::max(kl, 0.0);  // equal rows may come out below by rounding
}

class LogitsTap::TappedOps : public ForwardingOps {
 public:
  TappedOps(LogitsTap* tap, std::unique_ptr<Ops> backend) : ForwardingOps(std::move(backend)), tap_(*tap) {}

 protected:
  void DoSample(const SampleArgs& args) override {
    backend().Sample(args);
    if (!tap_.listener_) return;
    logits_.resize(static_cast<size_t>(args.rows * args.vocab));
    backend().Download(logits_.data(), args.logits, logits_.size() * sizeof(float));
    tap_.listener_(logits_, args.vocab);
  }

 private:
  LogitsTap& tap_;
  std::vector<float> logits_;
};

std::unique_ptr<Ops> LogitsTap::Wrap(int rank, std::unique_ptr<Ops> backend) {
  if (rank != 0) return backend;
  return std::make_unique<TappedOps>(this, std::move(backend));
}

int64_t DivergenceStepTokens(int64_t vocab_size) {
  const int64_t row_bytes = vocab_size * static_cast<int64_t>(sizeof(float));
  return std::clamp(kLogitBytes / row_bytes, kMinStepTokens, kScoreStepTokens);
}

absl::StatusOr<DivergenceReport> CompareDistributions(const TappedGroup& model, const TappedGroup& reference,
                                                      std::span<const std::vector<uint32_t>> sequences,
                                                      int64_t vocab_size, int threads,
                                                      const std::function<void(int64_t finished)>& done) {
  ThreadPool pool(threads);
  const size_t vocab = static_cast<size_t>(vocab_size);
  std::vector<float> logits;      // of the model, this step
  std::vector<double> divergence; // of every row so far
  size_t seen = 0;                // rows of this step that the reference has given
  std::vector<uint8_t> agrees;    // of the reference's rows of one call
  int64_t agreements = 0;
  model.tap.SetListener([&](std::span<const float> rows, int64_t columns) {
    NIBBLE_CHECK_EQ(columns, vocab_size);
    logits.insert(logits.end(), rows.begin(), rows.end());
  });
  reference.tap.SetListener([&](std::span<const float> rows, int64_t columns) {
    NIBBLE_CHECK_EQ(columns, vocab_size);
    const size_t count = rows.size() / vocab, base = divergence.size();
    NIBBLE_CHECK_LE((seen + count) * vocab, logits.size());
    divergence.resize(base + count);
    agrees.resize(count);
    pool.ParallelFor(static_cast<int64_t>(count), [&](int64_t item, int) {
      const size_t i = static_cast<size_t>(item);
      const std::span<const float> a = rows.subspan(i * vocab, vocab);
      const std::span<const float> b(logits.data() + (seen + i) * vocab, vocab);
      divergence[base + i] = KlDivergence(a, b);
      agrees[i] = std::ranges::max_element(a) - a.begin() == std::ranges::max_element(b) - b.begin();
    });
    agreements += std::count(agrees.begin(), agrees.end(), 1);
    seen += count;
  });

  model.group.Reset();
  reference.group.Reset();
  double log_prob = 0, reference_log_prob = 0;
  const int64_t pages = std::min(model.group.num_pages(), reference.group.num_pages());
  const absl::Status status = ForEachScoringStep(
      sequences, DivergenceStepTokens(vocab_size), pages, /*num_top_logprobs=*/0,
      [&](const ScoringStep& step) -> absl::Status {
        logits.clear();
        seen = 0;
        NIBBLE_ASSIGN_OR_RETURN(const v1::StepResult ours, model.group.Execute(step.plan));
        NIBBLE_ASSIGN_OR_RETURN(const v1::StepResult theirs, reference.group.Execute(step.plan));
        NIBBLE_CHECK_EQ(seen * vocab, logits.size());
        log_prob += LogProb(ours);
        reference_log_prob += LogProb(theirs);
        if (done && step.finished > 0) done(step.finished);
        return absl::OkStatus();
      });
  model.tap.SetListener({});
  reference.tap.SetListener({});
  NIBBLE_RETURN_IF_ERROR(status);

  DivergenceReport report{.tokens = static_cast<int64_t>(divergence.size())};
  if (divergence.empty()) return report;
  const double tokens = static_cast<double>(report.tokens);
  for (const double kl : divergence) report.mean_kl += kl / tokens;
  const auto p99 = divergence.begin() + static_cast<ptrdiff_t>((divergence.size() - 1) * 99 / 100);
  std::nth_element(divergence.begin(), p99, divergence.end());
  report.p99_kl = *p99;
  report.top1_agreement = static_cast<double>(agreements) / tokens;
  report.perplexity = std::exp(-log_prob / tokens);
  report.reference_perplexity = std::exp(-reference_log_prob / tokens);
  return report;
}

}  // namespace nibble
