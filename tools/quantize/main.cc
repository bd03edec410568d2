// nibble-quantize: an HF checkpoint in, a 4-bit checkpoint out.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "common/base/progress.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "tools/quantize/import_command.h"
#include "tools/quantize/quantizer.h"
#include "tools/quantize/report_command.h"

namespace nibble {
namespace {

std::atomic<int> interrupted_by{0};
static_assert(std::atomic<int>::is_always_lock_free);

// Progress on stderr, and the place where an interrupt takes effect.
class TerminalListener : public QuantizeListener {
 public:
  void Planned(int64_t predicted_peak_bytes, int64_t layers_done, int64_t layers) override {
    predicted_peak_bytes_ = predicted_peak_bytes;
    if (layers_done > 0)
      std::cerr << absl::StrFormat("nibble-quantize: continues behind %d of %d layers\n", layers_done, layers);
  }
  absl::Status Advanced(int64_t done, int64_t steps, const std::string& next) override {
    if (progress_ == nullptr) {
      progress_ = std::make_unique<Progress>(ProgressOptions{.label = "quantize", .unit = "steps", .total = steps});
    }
    progress_->Add(done - done_, next);
    done_ = done;
    if (done == steps) progress_->Finish();
    const int signal = interrupted_by.load();
    return signal == 0 ? absl::OkStatus() : absl::CancelledError(absl::StrFormat("stopped by signal %d", signal));
  }
  int64_t predicted_peak_bytes() const { return predicted_peak_bytes_; }

 private:
  std::unique_ptr<Progress> progress_;
  int64_t done_ = 0;
  int64_t predicted_peak_bytes_ = 0;
};

// Largest resident size so far; mapped files that were read count as long as they stay in memory.
int64_t PeakBytes() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} << 10;
}

std::string Megabytes(int64_t bytes) { return absl::StrFormat("%.1f MB", static_cast<double>(bytes) / 1e6); }

int Run(QuantizeOptions options, const std::string& mode) {
  options.mode = *ParseQuantization(mode);
  const auto start = std::chrono::steady_clock::now();
  TerminalListener listener;
  const absl::StatusOr<QuantizeReport> report = QuantizeModel(options, &listener);
  if (!report.ok()) {
    std::cerr << "nibble-quantize: " << report.status().message() << "\n";
    return absl::IsCancelled(report.status()) ? 128 + interrupted_by.load() : 1;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::cout << absl::StrFormat("%s  %s  %s to %s", options.output, mode, Megabytes(report->source_bytes),
                               Megabytes(report->output_bytes));
  if (report->blocks > 0) {
    std::cout << absl::StrFormat(
        "  %d of %d blocks in 8 bits (%.1f %%)", report->eight_bit_blocks, report->blocks,
        100.0 * static_cast<double>(report->eight_bit_blocks) / static_cast<double>(report->blocks));
  }
  std::cout << absl::StrFormat("  %.1f s", seconds);
  if (listener.predicted_peak_bytes() > 0) {
    std::cout << absl::StrFormat("  peak memory %s (%s predicted)", Megabytes(PeakBytes()),
                                 Megabytes(listener.predicted_peak_bytes()));
  }
  std::cout << "\n";
  return 0;
}

absl::Status ReadSettings(const std::string& preset, const std::vector<std::string>& assignments,
                          QuantizeSettings* settings) {
  NIBBLE_ASSIGN_OR_RETURN(*settings, PresetSettings(preset));
  for (const std::string& assignment : assignments) NIBBLE_RETURN_IF_ERROR(SetSetting(assignment, settings));
  return absl::OkStatus();
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  nibble::QuantizeOptions options;
  options.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::string mode = "w4a4kv4", preset = "best";
  std::vector<std::string> assignments;
  bool list_settings = false;

  CLI::App app(
      "Quantizes a Hugging Face Llama checkpoint for Nibble.\n\n"
      "  w4a4kv4   4-bit weights, activations (a few outlier blocks in 8 bits) and KV cache\n"
      "  w4a8kv4   4-bit weights and KV cache, 8-bit activations\n"
      "  bf16      unquantized copy: the reference that accuracy is measured against\n\n"
      "The output appears whole or not at all; any tensor-parallel size loads it. Finished layers are kept in "
      "OUTPUT.work\n"
      "until then, so that an interrupted run can be continued.");
  app.set_version_flag("--version", nibble::kVersion);
  app.add_option("--model", options.model, "Source directory: config.json, tokenizer.json, *.safetensors");
  app.add_option("--output", options.output, "Directory to create");
  app.add_option("--mode", mode, "What to make")
      ->check(CLI::IsMember({"w4a4kv4", "w4a8kv4", "bf16"}))
      ->capture_default_str();
  auto* calibration = app.add_option("--calibration", options.calibration,
                                     "UTF-8 text like what the model will see; not needed for bf16");
  app.add_flag("--resume", options.resume, "Continue an interrupted run from what it left in OUTPUT.work");
  app.add_option("--device", options.device, "Where Hessians are summed and weights rounded: cpu or cuda")->capture_default_str();
  app.add_flag("--force", options.overwrite, "Replace an existing output (only ever a model directory)");
  auto& c = options.calibration_options;
  app.add_option("--windows", c.windows, "Calibration windows, spread over the text")
      ->check(CLI::Range(4, 65536))
      ->capture_default_str();
  app.add_option("--window-tokens", c.window_tokens, "Tokens of a window")
      ->check(CLI::Range(16, 32768))
      ->capture_default_str();
  app.add_option("--preset", preset, "Which ideas are used: best, balanced, fast or none (plain rounding)")
      ->capture_default_str();
  app.add_option("--set", assignments, "NAME=VALUE: one setting other than the preset has it; may be repeated");
  app.add_flag("--settings", list_settings, "Print every setting as preset and --set leave it, and stop");
  app.add_option("--shard-bytes", options.max_shard_bytes, "Largest safetensors file")
      ->check(CLI::Range(int64_t{1} << 20, int64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
  nibble::ImportCommand import_command;
  import_command.Register(&app);
  nibble::ReportCommand report;
  report.Register(&app);
  CLI11_PARSE(app, argc, argv);
  if (app.got_subcommand("import")) return import_command.Run();
  if (app.got_subcommand("report")) return report.Run();
  const auto refuse = [](const std::string& reason) {
    std::cerr << "nibble-quantize: " << reason << "\n";
    return 2;
  };
  if (const absl::Status status = nibble::ReadSettings(preset, assignments, &options.settings); !status.ok())
    return refuse(std::string(status.message()));
  if (list_settings) {
    std::cout << nibble::DescribeSettings(options.settings);
    return 0;
  }
  if (options.model.empty()) return refuse("--model is required");
  if (options.output.empty()) return refuse("--output is required");
  if (mode != "bf16" && calibration->count() == 0) return refuse("--calibration is required for --mode " + mode);

  // A file size limit is an error with a name (EFBIG), not the end of the process; an interrupt cleans up first.
  std::signal(SIGXFSZ, SIG_IGN);
  for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int s) { nibble::interrupted_by.store(s); });
  return nibble::Run(options, mode);
}
