#include "tools/quantize/import_command.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <thread>

#include "absl/strings/str_format.h"
#include "common/base/progress.h"

namespace nibble {

void ImportCommand::Register(CLI::App* app) {
  options.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  CLI::App* command = app->add_subcommand(
      "import",
      "Turns a checkpoint that AutoGPTQ or AutoAWQ quantized (4 bits, groups of 128) into a w4a8kv4 checkpoint");
  command->add_option("--model", options.model, "Source directory: config.json, tokenizer.json, *.safetensors")
      ->required();
  command->add_option("--output", options.output, "Directory to create")->required();
  command->add_flag("--force", options.overwrite, "Replace an existing output (only ever a model directory)");
  command
      ->add_option(
          "--max-steps", options.max_rms_steps,
          "Refuse a linear whose weights move further than this (root mean square, in steps of its groups; its "
          "own rounding is worth 0.29)")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
  command->add_option("--shard-bytes", options.max_shard_bytes, "Largest safetensors file")
      ->check(CLI::Range(int64_t{1} << 20, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--threads", options.threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
}

int ImportCommand::Run() {
  std::unique_ptr<Progress> progress;
  const auto advance = [&](int64_t done, int64_t total) {
    if (progress == nullptr)
      progress = std::make_unique<Progress>(ProgressOptions{.label = "import", .unit = "linears", .total = total});
    progress->Add(1, "");
    if (done == total) progress->Finish();
    return absl::OkStatus();
  };
  const absl::StatusOr<ImportReport> report = ImportModel(options, advance);
  if (!report.ok()) {
    std::cerr << "nibble-quantize: " << report.status().message() << "\n";
    return 1;
  }
  std::cout << absl::StrFormat("%s  w4a8kv4 from %s  %.1f MB  %d of %d linears exactly", options.output, report->method,
                               static_cast<double>(report->output_bytes) / 1e6, report->exact, report->linears);
  if (report->exact < report->linears) {
    std::cout << absl::StrFormat("; the others' weights moved by up to %.3f steps (root mean square, %s)",
                                 report->rms_steps, report->worst);
  }
  std::cout << "\n";
  return 0;
}

}  // namespace nibble
