#include "tools/bench/serve.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <ctime>
#include <ostream>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/progress.h"
#include "common/base/status.h"
#include "nibble/v1/inference.grpc.pb.h"
#include "tools/bench/load.h"
#include "tools/bench/serve_report.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

std::string UtcDate() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y%m%d-%H%M%S", &utc);
  return text;
}

// Model and version, and the proof that the server answers, before anything is measured.
grpc::Status AskServer(const std::shared_ptr<grpc::Channel>& channel, ServeRun* run) {
  const auto stub = v1::Inference::NewStub(channel);
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(10);
  grpc::ClientContext model_context;
  model_context.set_deadline(deadline);
  if (const grpc::Status status = stub->GetModelInfo(&model_context, {}, &run->model); !status.ok()) return status;
  grpc::ClientContext status_context;
  status_context.set_deadline(deadline);
  v1::GetStatusResponse response;
  const grpc::Status status = stub->GetStatus(&status_context, {}, &response);
  run->server_version = response.version();
  return status;
}

absl::Status ParseRate(const std::string& text, double* rate) {
  if (absl::SimpleAtod(text, rate) && *rate > 0) return absl::OkStatus();  // "inf" parses
  return absl::InvalidArgumentError(absl::StrCat("--request-rate is '", text, "', must be a number above 0, or inf"));
}

int Fail(std::ostream& err, const std::string& text, int code) {
  err << "error: " << text << std::endl;
  return code;
}

// The first failure of the warm-up, as an exit code; kExitOk without one.
int CheckWarmup(const LoadResult& warmup, std::ostream& err) {
  for (const RequestRecord& record : warmup.records) {
    if (record.ok()) continue;
    if (warmup.interrupted) return kExitInterrupted;
    const RpcError error = ReadRpcError(grpc::Status(record.code, ""));
    return Fail(err, absl::StrCat("the warm-up request failed: ", record.error), error.exit_code);
  }
  return kExitOk;
}

}  // namespace

void AddServeFlags(CLI::App* app, ServeFlags* flags) {
  WorkloadOptions* w = &flags->workload;
  const CLI::Range length(int64_t{1}, int64_t{1} << 24), count(int64_t{0}, int64_t{1} << 24);
  app->add_option("--num-requests,--num-prompts", w->num_requests, "Requests to send")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  app->add_option("--input-len,--random-input-len", w->input_len, "Tokens of each (random) prompt")
      ->check(length)
      ->capture_default_str();
  app->add_option("--output-len,--random-output-len", w->output_len, "Tokens to generate for each")
      ->check(length)
      ->capture_default_str();
  app->add_option("--prefix-len,--random-prefix-len", w->prefix_len, "Tokens of it that all prompts share")
      ->check(count)
      ->capture_default_str();
  app->add_option("--dataset", w->dataset_file,
                  "JSONL of {\"input_len\" | \"prompt\" | \"token_ids\", \"output_len\"}, instead of fixed lengths");
  app->add_option("--request-rate", flags->request_rate, "Requests per second, inf = all at once")
      ->capture_default_str();
  app->add_option("--burstiness", w->burstiness, "Shape of the gaps: 1 = Poisson, below = bursts, above = even")
      ->check(CLI::Range(1e-3, 1e6))
      ->capture_default_str();
  app->add_option("--max-concurrency", flags->max_concurrency, "Requests in flight at most; 0 = no limit")
      ->check(count)
      ->capture_default_str();
  app->add_option("--warmup", flags->warmup, "Requests sent before the measurement, not counted")
      ->check(count)
      ->capture_default_str();
  app->add_option("--seed", w->seed, "Of prompts and arrival times")->capture_default_str();
  app->add_option("--temperature", w->temperature, "0 = greedy")->capture_default_str();
  app->add_flag("--ignore-eos,!--no-ignore-eos", w->ignore_eos, "Generate exactly output-len tokens (default: on)");
  app->add_option("--goodput", flags->goodput, "ttft:MS tpot:MS e2el:MS: limits that a good request keeps");
  app->add_option("--percentiles", flags->percentiles, "Percentiles to report, like 50,90,99")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app->add_option("--request-timeout", flags->request_timeout_s, "Seconds until a request gives up; 0 = never")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  app->add_option("--connections", flags->connections, "Connections the streams are dealt to")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app->add_option("--json", flags->json_file, "Write the result to a file (keys as vLLM's), - = stdout, no table");
  app->add_flag("--detailed", flags->detailed, "Lengths, times and error of every request in the JSON too");
  AddServerFlags(app, &flags->server);
}

int ServeCommand(ServeFlags flags, std::ostream& out, std::ostream& err, Interrupt* interrupt) {
  ServeRun run;
  if (const auto status = ParseRate(flags.request_rate, &flags.workload.request_rate); !status.ok()) {
    return Fail(err, std::string(status.message()), kExitUsage);
  }
  const auto goodput = ParseGoodput(flags.goodput);
  if (!goodput.ok()) return Fail(err, absl::StrCat("--", goodput.status().message()), kExitUsage);
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int64_t i = 0; i < flags.connections; ++i) {
    auto channel = OpenChannel(flags.server);
    if (!channel.ok()) return Fail(err, std::string(channel.status().message()), kExitUsage);
    channels.push_back(*std::move(channel));
  }
  if (const grpc::Status status = AskServer(channels.front(), &run); !status.ok()) {
    const RpcError error = ReadRpcError(status);
    return Fail(err, FormatRpcError(error), error.exit_code);
  }
  const auto workload = Workload::Make(flags.workload, run.model);
  if (!workload.ok()) return Fail(err, std::string(workload.status().message()), kExitUsage);
  run.workload = flags.workload;
  run.max_concurrency = flags.max_concurrency;
  run.goodput = *goodput;
  run.date = UtcDate();

  if (flags.warmup > 0) {
    const LoadResult warmup = RunLoad(channels, *workload,
                                      {.max_concurrency = flags.max_concurrency,
                                       .request_timeout_s = flags.request_timeout_s,
                                       .first_index = flags.workload.num_requests,
                                       .num_requests = flags.warmup,
                                       .at_once = true},
                                      nullptr, interrupt);
    if (const int code = CheckWarmup(warmup, err); code != kExitOk) return code;
  }

  Progress progress({.label = "serve", .unit = "requests", .total = flags.workload.num_requests});
  const LoadResult result = RunLoad(channels, *workload,
                                    {.max_concurrency = flags.max_concurrency,
                                     .request_timeout_s = flags.request_timeout_s,
                                     .num_requests = flags.workload.num_requests},
                                    &progress, interrupt);
  progress.Finish();

  const ServeMetrics metrics = Measure(result, run.goodput, flags.percentiles);
  if (flags.json_file != "-") out << FormatServeReport(run, metrics) << std::flush;
  if (!flags.json_file.empty()) {
    const std::string json = ServeReportJson(run, metrics, result, flags.detailed)
                                 .dump(2, ' ', false, nlohmann::json::error_handler_t::replace) +
                             "\n";
    if (flags.json_file == "-") {
      out << json << std::flush;
    } else if (const absl::Status status = WriteFileAtomically(flags.json_file, json); !status.ok()) {
      return Fail(err, std::string(status.message()), kExitFailure);
    }
  }
  if (result.interrupted) return Fail(err, "interrupted; requests in flight were cancelled", kExitInterrupted);
  return metrics.failed > 0 || !out.good() ? kExitFailure : kExitOk;
}

}  // namespace nibble
