// nibble-eval: perplexity of a checkpoint on a text, and its golden prompts, through the engine that serves.
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
#include "tools/eval/engine_group.h"
#include "tools/eval/golden.h"
#include "tools/eval/scorer.h"

namespace nibble {
namespace {

struct Options {
  std::string model;
  std::string text;
  std::string golden;
  int64_t window = 512;
  int64_t max_windows = 400;
  double tolerance = 0.02;
  int tp = 1;
  int threads = 0;  // all ranks together
  bool json = false;
};

// Consecutive windows, without special tokens; what is left at the end is not scored.
absl::StatusOr<std::vector<std::vector<uint32_t>>> Windows(const Options& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model));
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(options.text, Tokenizer::kMaxTextBytes));
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids,
                          tokenizer->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false}));
  std::vector<std::vector<uint32_t>> windows;
  for (size_t at = 0, length = static_cast<size_t>(options.window);
       at + length <= ids.size() && windows.size() < static_cast<size_t>(options.max_windows); at += length) {
    windows.emplace_back(ids.begin() + static_cast<std::ptrdiff_t>(at),
                         ids.begin() + static_cast<std::ptrdiff_t>(at + length));
  }
  if (windows.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.text, ": has ", ids.size(), " tokens, fewer than one window of ", options.window));
  }
  return windows;
}

absl::StatusOr<std::unique_ptr<EngineGroup>> OpenGroup(const Options& options, const Checkpoint& checkpoint,
                                                       int64_t max_tokens) {
  const int64_t context = checkpoint.config().max_position_embeddings;
  if (max_tokens > context) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences of ", max_tokens, " tokens, the model's context has ", context));
  }
  return EngineGroup::Create(checkpoint, {.world_size = options.tp,
                                          .threads_per_rank = std::max(1, options.threads / options.tp),
                                          .limits = ScoringLimits(checkpoint.config(), options.tp, max_tokens)});
}

absl::Status Perplexity(const Options& options, const Checkpoint& checkpoint) {
  NIBBLE_ASSIGN_OR_RETURN(const auto windows, Windows(options));
  NIBBLE_ASSIGN_OR_RETURN(const auto group, OpenGroup(options, checkpoint, options.window));
  Progress progress({.label = "eval", .unit = "windows", .total = static_cast<int64_t>(windows.size())});
  const auto start = std::chrono::steady_clock::now();
  NIBBLE_ASSIGN_OR_RETURN(const auto scores, Score(*group, windows, /*num_top_logprobs=*/0, [&] { progress.Add(); }));
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  progress.Finish();

  double sum = 0;
  int64_t tokens = 0;
  for (const auto& window : scores) {
    for (const TokenScore& score : window) sum -= score.logprob;
    tokens += static_cast<int64_t>(window.size());
  }
  const double perplexity = std::exp(sum / static_cast<double>(tokens));
  const std::string mode = QuantizationName(checkpoint.config().quantization);
  if (options.json) {
    std::cout << nlohmann::json{{"model", options.model},
                                {"quantization", mode},
                                {"text", options.text},
                                {"window", options.window},
                                {"windows", windows.size()},
                                {"perplexity", perplexity},
                                {"tokens", tokens},
                                {"tp", options.tp},
                                {"backend", group->Describe()},
                                {"seconds", seconds},
                                {"tokens_per_second", static_cast<double>(tokens) / seconds}}
                     .dump()
              << "\n";
  } else {
    std::cout << absl::StrFormat(
        "perplexity %.4f  over %d tokens (%d windows of %d)  %s  tp=%d  %.1f s  %.0f tokens/s\n", perplexity, tokens,
        windows.size(), options.window, mode, options.tp, seconds, static_cast<double>(tokens) / seconds);
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
  NIBBLE_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.model));
  if (!options.text.empty()) NIBBLE_RETURN_IF_ERROR(Perplexity(options, *checkpoint));
  if (!options.golden.empty()) NIBBLE_RETURN_IF_ERROR(Golden(options, *checkpoint));
  return absl::OkStatus();
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  nibble::Options options;
  CLI::App app("Perplexity of a checkpoint on a text, and its golden prompts, through the engine that serves.");
  app.set_version_flag("--version", nibble::kVersion);
  app.add_option("--model", options.model, "Model directory: config.json, tokenizer.json, *.safetensors")->required();
  auto* text = app.add_option("--text", options.text, "UTF-8 text to score");
  auto* golden =
      app.add_option("--golden", options.golden, "golden.json to compare with; exit status 1 when a prompt is off");
  app.add_option("--window", options.window, "Tokens of one window; scored from its second token")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-windows", options.max_windows, "Score the first windows only")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--tolerance", options.tolerance, "Largest difference of a golden log-probability")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--tp", options.tp, "Tensor-parallel ranks, as threads of this process")
      ->check(CLI::Range(1, nibble::kMaxRanks))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads of all ranks together (default: one per core)")
      ->check(CLI::Range(1, 1024));
  app.add_flag("--json", options.json, "One JSON object per result on stdout");
  CLI11_PARSE(app, argc, argv);
  if (text->count() == 0 && golden->count() == 0) {
    std::cerr << "nibble-eval: give --text, --golden or both\n";
    return 2;
  }
  if (options.threads == 0) options.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (const absl::Status status = nibble::Run(options); !status.ok()) {
    std::cerr << "nibble-eval: " << status.message() << "\n";
    return 1;
  }
  return 0;
}
