// nibble-eval: what a checkpoint is worth, through the engine that serves: perplexity on a text, divergence from a
// reference, multiple-choice questions, golden prompts.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "common/base/progress.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/model/checkpoint.h"
#include "common/text/tokenizer.h"
#include "nlohmann/json.hpp"
#include "tools/eval/divergence.h"
#include "tools/eval/engine_group.h"
#include "tools/eval/golden.h"
#include "tools/eval/multiple_choice.h"
#include "tools/eval/per_token_ops.h"
#include "tools/eval/scorer.h"

namespace nibble {
namespace {

struct Options {
  std::string model;
  std::string reference;
  std::string text;
  std::string questions;
  std::string golden;
  int64_t window = 512;
  int64_t skip_windows = 0;
  int64_t max_windows = 400;
  bool per_token_activations = false;
  double tolerance = 0.02;
  int tp = 1;
  std::string backend = "cpu";
  int device = 0;
  int threads = 0;  // all ranks together
  bool json = false;
};

// Consecutive windows, without special tokens; what is left at the end is not scored.
absl::StatusOr<std::vector<std::vector<uint32_t>>> Windows(const Options& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model));
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(options.text, Tokenizer::kMaxTextBytes));
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids,
                          tokenizer->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false}));
  const size_t length = static_cast<size_t>(options.window);
  std::vector<std::vector<uint32_t>> windows;
  for (size_t at = static_cast<size_t>(options.skip_windows) * length;
       at + length <= ids.size() && windows.size() < static_cast<size_t>(options.max_windows); at += length) {
    const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(at);
    windows.emplace_back(begin, begin + options.window);
  }
  if (windows.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.text, ": has ", ids.size(), " tokens, needs at least ",
                                                   (options.skip_windows + 1) * options.window, " for window ",
                                                   options.skip_windows, " of ", options.window));
  }
  return windows;
}

absl::StatusOr<std::unique_ptr<EngineGroup>> OpenGroup(const Options& options, const Checkpoint& checkpoint,
                                                       int64_t max_tokens, int64_t step_tokens = kScoreStepTokens,
                                                       LogitsTap* tap = nullptr) {
  const int64_t context = checkpoint.config().max_position_embeddings;
  if (max_tokens > context) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences of ", max_tokens, " tokens, the model's context has ", context));
  }
  return EngineGroup::Create(
      checkpoint, {.world_size = options.tp,
                   .backend = options.backend,
                   .device = options.device,
                   .threads_per_rank = std::max(1, options.threads / options.tp),
                   .limits = ScoringLimits(checkpoint.config(), options.tp, max_tokens, step_tokens),
                   .wrap_ops = [&](int rank, std::unique_ptr<Ops> ops) {
                     if (options.per_token_activations) ops = std::make_unique<PerTokenFourBitOps>(std::move(ops));
                     return tap == nullptr ? std::move(ops) : tap->Wrap(rank, std::move(ops));
                   }});
}

// What every result says of itself.
nlohmann::json Describe(const Options& options, const Checkpoint& checkpoint, const EngineGroup& group) {
  nlohmann::json json = {{"model", options.model},
                         {"quantization", QuantizationName(checkpoint.config().quantization)},
                         {"tp", options.tp},
                         {"backend", group.Describe()}};
  if (options.per_token_activations) json["activations"] = "per-token-4";
  return json;
}

struct Timed {
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
};

absl::Status Perplexity(const Options& options, const Checkpoint& checkpoint) {
  NIBBLE_ASSIGN_OR_RETURN(const auto windows, Windows(options));
  NIBBLE_ASSIGN_OR_RETURN(const auto group, OpenGroup(options, checkpoint, options.window));
  Progress progress({.label = "eval", .unit = "windows", .total = static_cast<int64_t>(windows.size())});
  const Timed timed;
  NIBBLE_ASSIGN_OR_RETURN(
      const auto scores, Score(*group, windows, /*num_top_logprobs=*/0, [&](int64_t n) { progress.Add(n); }));
  const double seconds = timed.seconds();
  progress.Finish();

  double sum = 0;
  int64_t tokens = 0;
  for (const auto& window : scores) {
    for (const TokenScore& score : window) sum -= static_cast<double>(score.logprob);
    tokens += static_cast<int64_t>(window.size());
  }
  const double perplexity = std::exp(sum / static_cast<double>(tokens));
  if (options.json) {
    nlohmann::json json = Describe(options, checkpoint, *group);
    json.update({{"text", options.text},
                 {"window", options.window},
                 {"skip_windows", options.skip_windows},
                 {"windows", windows.size()},
                 {"perplexity", perplexity},
                 {"tokens", tokens},
                 {"seconds", seconds},
                 {"tokens_per_second", static_cast<double>(tokens) / seconds}});
    std::cout << json.dump() << "\n";
  } else {
    std::cout << absl::StrFormat(
        "perplexity %.4f  over %d tokens (%d windows of %d)  %s  tp=%d  %.1f s  %.0f tokens/s\n", perplexity, tokens,
        windows.size(), options.window, QuantizationName(checkpoint.config().quantization), options.tp, seconds,
        static_cast<double>(tokens) / seconds);
  }
  return absl::OkStatus();
}

absl::Status Divergence(const Options& options, const Checkpoint& checkpoint) {
  NIBBLE_ASSIGN_OR_RETURN(const auto reference, Checkpoint::Open(options.reference));
  const int64_t vocab = checkpoint.config().vocab_size;
  if (reference->config().vocab_size != vocab) {
    return absl::InvalidArgumentError(absl::StrCat(options.reference, ": has a vocabulary of ",
                                                   reference->config().vocab_size, ", the model's has ", vocab));
  }
  NIBBLE_ASSIGN_OR_RETURN(const auto windows, Windows(options));
  LogitsTap tap, reference_tap;
  const int64_t rows = DivergenceStepTokens(vocab);
  NIBBLE_ASSIGN_OR_RETURN(const auto group, OpenGroup(options, checkpoint, options.window, rows, &tap));
  NIBBLE_ASSIGN_OR_RETURN(const auto reference_group,
                          OpenGroup(options, *reference, options.window, rows, &reference_tap));
  Progress progress({.label = "compare", .unit = "windows", .total = static_cast<int64_t>(windows.size())});
  const Timed timed;
  NIBBLE_ASSIGN_OR_RETURN(const DivergenceReport report,
                          CompareDistributions({*group, tap}, {*reference_group, reference_tap}, windows, vocab,
                                               options.threads, [&](int64_t n) { progress.Add(n); }));
  const double seconds = timed.seconds();
  progress.Finish();
  const double ratio = report.perplexity / report.reference_perplexity;
  if (options.json) {
    nlohmann::json json = Describe(options, checkpoint, *group);
    json.update({{"reference", options.reference},
                 {"text", options.text},
                 {"window", options.window},
                 {"skip_windows", options.skip_windows},
                 {"windows", windows.size()},
                 {"tokens", report.tokens},
                 {"perplexity", report.perplexity},
                 {"reference_perplexity", report.reference_perplexity},
                 {"ratio", ratio},
                 {"mean_kl", report.mean_kl},
                 {"p99_kl", report.p99_kl},
                 {"top1_agreement", report.top1_agreement},
                 {"seconds", seconds}});
    std::cout << json.dump() << "\n";
  } else {
    std::cout << absl::StrFormat(
        "perplexity %.4f  reference %.4f  ratio %.4f  KL mean %.5f p99 %.4f nats  top-1 agreement %.2f %%\n"
        "over %d tokens (%d windows of %d)  %s  tp=%d  %.1f s\n",
        report.perplexity, report.reference_perplexity, ratio, report.mean_kl, report.p99_kl,
        100 * report.top1_agreement, report.tokens, windows.size(), options.window,
        QuantizationName(checkpoint.config().quantization), options.tp, seconds);
  }
  return absl::OkStatus();
}

absl::Status Questions(const Options& options, const Checkpoint& checkpoint) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model));
  NIBBLE_ASSIGN_OR_RETURN(const auto questions, LoadChoiceQuestions(options.questions));
  const auto encoded = EncodeChoices(*tokenizer, questions, checkpoint.config().max_position_embeddings);
  if (!encoded.ok()) return Annotate(encoded.status(), options.questions);
  size_t longest = 2;
  int64_t sequences = 0;
  for (const auto& choices : *encoded) {
    for (const ChoiceTokens& choice : choices) longest = std::max(longest, choice.ids.size());
    sequences += static_cast<int64_t>(choices.size());
  }
  NIBBLE_ASSIGN_OR_RETURN(const auto group, OpenGroup(options, checkpoint, static_cast<int64_t>(longest)));
  Progress progress({.label = "questions", .unit = "choices", .total = sequences});
  const Timed timed;
  NIBBLE_ASSIGN_OR_RETURN(const ChoiceReport report,
                          AnswerQuestions(*group, questions, *encoded, [&](int64_t n) { progress.Add(n); }));
  const double seconds = timed.seconds();
  progress.Finish();
  const double error = StandardError(report.accuracy(), report.questions);
  const double normalized_error = StandardError(report.accuracy_normalized(), report.questions);
  if (options.json) {
    nlohmann::json json = Describe(options, checkpoint, *group);
    json.update({{"questions_file", options.questions},
                 {"questions", report.questions},
                 {"accuracy", report.accuracy()},
                 {"accuracy_stderr", error},
                 {"accuracy_normalized", report.accuracy_normalized()},
                 {"accuracy_normalized_stderr", normalized_error},
                 {"chance", report.chance},
                 {"seconds", seconds}});
    std::cout << json.dump() << "\n";
  } else {
    std::cout << absl::StrFormat(
        "accuracy %.2f %% ± %.2f  length-normalised %.2f %% ± %.2f  chance %.2f %%  %d questions  %s  tp=%d  %.1f s\n",
        100 * report.accuracy(), 100 * error, 100 * report.accuracy_normalized(), 100 * normalized_error,
        100 * report.chance, report.questions, QuantizationName(checkpoint.config().quantization), options.tp,
        seconds);
  }
  return absl::OkStatus();
}

absl::Status Golden(const Options& options, const Checkpoint& checkpoint) {
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<GoldenPrompt> prompts, LoadGolden(options.golden));
  size_t longest = 0;
  for (const GoldenPrompt& p : prompts) longest = std::max(longest, p.prompt_ids.size() + p.greedy_ids.size());
  NIBBLE_ASSIGN_OR_RETURN(const auto group, OpenGroup(options, checkpoint, static_cast<int64_t>(longest)));
  NIBBLE_ASSIGN_OR_RETURN(const auto reports, CompareGolden(*group, prompts));
  size_t passed = 0;
  for (const GoldenReport& report : reports) passed += report.Passed(options.tolerance);
  if (options.json) {
    nlohmann::json json = {{"model", options.model},
                           {"tolerance", options.tolerance},
                           {"passed", passed},
                           {"prompts", nlohmann::json::array()}};
    for (const GoldenReport& r : reports) {
      json["prompts"].push_back({{"prompt", r.prompt},
                                 {"tokens", r.tokens},
                                 {"max_logprob_error", r.max_logprob_error},
                                 {"max_logit_error", r.max_logit_error},
                                 {"best_tokens", r.best_tokens},
                                 {"passed", r.Passed(options.tolerance)}});
    }
    std::cout << json.dump() << "\n";
  } else {
    std::cout << FormatGolden(reports, options.tolerance) << passed << " of " << reports.size() << " prompts within "
              << options.tolerance << "\n";
  }
  if (passed == reports.size()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(reports.size() - passed, " golden prompts are off by more than ", options.tolerance));
}

absl::Status Run(const Options& options) {
  if (options.backend != "cpu" && (options.per_token_activations || !options.reference.empty())) {
    return absl::InvalidArgumentError("--reference and --per-token-activations look into operators: use --backend cpu");
  }
  NIBBLE_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.model));
  if (!options.text.empty()) {
    NIBBLE_RETURN_IF_ERROR(options.reference.empty() ? Perplexity(options, *checkpoint)
                                                     : Divergence(options, *checkpoint));
  }
  if (!options.questions.empty()) NIBBLE_RETURN_IF_ERROR(Questions(options, *checkpoint));
  if (!options.golden.empty()) NIBBLE_RETURN_IF_ERROR(Golden(options, *checkpoint));
  return absl::OkStatus();
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  nibble::Options options;
  CLI::App app(
      "What a checkpoint is worth, measured through the engine that serves: perplexity on a text, divergence from a\n"
      "reference model, multiple-choice questions, golden prompts.");
  app.set_version_flag("--version", nibble::kVersion);
  app.add_option("--model", options.model, "Model directory: config.json, tokenizer.json, *.safetensors")->required();
  auto* text = app.add_option("--text", options.text, "UTF-8 text to score");
  app.add_option("--reference", options.reference,
                 "Unquantized model: with --text, also KL divergence from it and agreement of the best token")
      ->needs(text);
  auto* questions = app.add_option("--multiple-choice", options.questions,
                                   "JSONL of questions, one object a line: context or question, choices, answer "
                                   "(index from 0); HellaSwag and ARC files as they are");
  auto* golden =
      app.add_option("--golden", options.golden, "golden.json to compare with; exit status 1 when a prompt is off");
  app.add_option("--window", options.window, "Tokens of one window; scored from its second token")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--skip-windows", options.skip_windows, "Leave out the first windows of the text")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_option("--max-windows", options.max_windows, "Score at most so many windows")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--tolerance", options.tolerance, "Largest difference of a golden log-probability")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--tp", options.tp, "Tensor-parallel ranks, as threads of this process")
      ->check(CLI::Range(1, nibble::kMaxRanks))
      ->capture_default_str();
  app.add_option("--backend", options.backend, "What computes: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--device", options.device, "CUDA device ordinal")->check(CLI::Range(0, 1023))->capture_default_str();
  app.add_option("--threads", options.threads, "Threads of all ranks together (default: one per core)")
      ->check(CLI::Range(1, 1024));
  app.add_flag("--per-token-activations", options.per_token_activations,
               "For comparison: code activations with one 4-bit scale per token instead of the checkpoint's blocks");
  app.add_flag("--json", options.json, "One JSON object per result on stdout");
  CLI11_PARSE(app, argc, argv);
  if (text->count() + questions->count() + golden->count() == 0) {
    std::cerr << "nibble-eval: give --text, --multiple-choice or --golden\n";
    return 2;
  }
  if (options.threads == 0) options.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (const absl::Status status = nibble::Run(options); !status.ok()) {
    std::cerr << "nibble-eval: " << status.message() << "\n";
    return 1;
  }
  return 0;
}
