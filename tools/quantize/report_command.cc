#include "tools/quantize/report_command.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <thread>

#include "common/base/file.h"
#include "common/base/progress.h"
#include "common/base/status.h"

namespace nibble {
namespace {

absl::Status WriteReport(const ReportCommand& command) {
  std::unique_ptr<Progress> progress;
  int64_t before = 0;
  const auto listen = [&](int64_t done, int64_t total) {
    if (progress == nullptr)
      progress = std::make_unique<Progress>(ProgressOptions{.label = "compare", .unit = "windows", .total = total});
    progress->Add(done - before);
    before = done;
  };
  NIBBLE_ASSIGN_OR_RETURN(const QuantizationReport report, BuildReport(command.options, listen));
  if (progress != nullptr) progress->Finish();
  std::cout << FormatReport(report);
  if (!command.json.empty())
    NIBBLE_RETURN_IF_ERROR(WriteFileAtomically(command.json, ReportJson(report).dump(1) + "\n"));
  if (!command.html.empty()) NIBBLE_RETURN_IF_ERROR(WriteFileAtomically(command.html, ReportHtml(report)));
  return absl::OkStatus();
}

}  // namespace

void ReportCommand::Register(CLI::App* app) {
  options.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  CLI::App* report = app->add_subcommand("report", "What quantizing did to a model: errors, outliers, sizes, perplexity");
  report->add_option("--model", options.model, "The unquantized model")->required();
  report->add_option("--quantized", options.quantized, "What was made from it")->required();
  report->add_option("--text", options.text,
                     "UTF-8 text that both read, for perplexity and outliers; both are then in memory");
  report->add_option("--window", options.window, "Tokens of a window of the text")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  report->add_option("--max-windows", options.max_windows, "Windows at most")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  report->add_option("--json", json, "File to write the report to as JSON");
  report->add_option("--html", html, "File to write the report to as one HTML page");
  report->add_option("--threads", options.threads, "Threads")->check(CLI::Range(1, 1024));
}

int ReportCommand::Run() {
  const absl::Status status = WriteReport(*this);
  if (status.ok()) return 0;
  std::cerr << "nibble-quantize report: " << status.message() << "\n";
  return 1;
}

}  // namespace nibble
