#include "tools/bench/op.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <ctime>
#include <ostream>

#include "common/base/file.h"
#include "common/base/version.h"
#include "kernels/cpu/cpu_ops.h"
#include "tools/bench/op_measure.h"

namespace nibble {
namespace {

constexpr int kOk = 0, kWrong = 1, kUsage = 2, kNoBackend = 3;

std::string UtcNow() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y%m%d-%H%M%S", &utc);
  return text;
}

int Fail(std::ostream& err, const absl::Status& status, int code) {
  err << "error: " << status.message() << std::endl;
  return code;
}

OpResult MeasureOne(const OpSpec& spec, const OpFlags& flags, const OpContext& context, OpMeasure& measure) {
  OpResult result = {.spec = spec};
  auto op = MakeOpCase(context, spec);
  if (!op.ok()) {
    result.error = std::string(op.status().message());
    return result;
  }
  result.bytes = (*op)->bytes;
  result.operations = (*op)->operations;
  result.unit = (*op)->unit;
  if (flags.check) result.error = (*op)->Check();
  usleep(1000 * flags.pause_ms);
  measure.Time(**op, flags.replays, &result);
  if (flags.baselines) {
    usleep(1000 * flags.pause_ms);
    measure.TimeBaselines(**op, flags.replays, &result);
  }
  return result;
}

}  // namespace

void AddOpFlags(CLI::App* app, OpFlags* flags) {
  app->add_option("--backend", flags->ops.backend, "cpu or cuda")->capture_default_str();
  app->add_option("--device", flags->ops.device, "CUDA device ordinal")->check(CLI::Range(0, 1023))->capture_default_str();
  app->add_option("--threads", flags->ops.threads, "CPU threads")->check(CLI::Range(1, 1024))->capture_default_str();
  app->add_option("--ops", flags->filter.ops, "Operators, all by default")->delimiter(',');
  app->add_option("--shapes", flags->filter.shapes, "Models, or their tensor-parallel shards: 70b, 70b.tp2, 8b, ...")
      ->delimiter(',');
  app->add_option("--rows", flags->filter.rows, "Rows of a step, instead of each operator's own list")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{16384}));
  app->add_option("--replays", flags->replays, "Replays of which the median is reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app->add_option("--pause-ms", flags->pause_ms, "Pause before each measurement")
      ->check(CLI::Range(0, 10'000))
      ->capture_default_str();
  app->add_flag("!--no-check", flags->check, "Do not compare with the CPU specification");
  app->add_flag("!--no-baselines", flags->baselines, "Do not time cuBLASLt beside linears");
  app->add_option("--json", flags->json_file, "Also write a JSON file; - for stdout instead of the table");
}

int OpCommand(const OpFlags& flags, const std::string& command, std::ostream& out, std::ostream& err) {
  const auto specs = SelectOps(flags.filter);
  if (!specs.ok()) return Fail(err, specs.status(), kUsage);
  auto ops = CreateOps(flags.ops);
  if (!ops.ok()) return Fail(err, ops.status(), absl::IsInvalidArgument(ops.status()) ? kUsage : kNoBackend);
  auto measure = CreateOpMeasure(flags.ops, **ops);
  if (!measure.ok()) return Fail(err, measure.status(), kNoBackend);
  const std::unique_ptr<Ops> specification = CreateCpuOps({.threads = flags.ops.threads});

  OpRun run = {.date = UtcNow(), .version = kVersion, .command = command, .backend = (*ops)->Describe()};
  (*measure)->Describe(&run);
  const OpContext context = {**ops, *specification, (*measure)->rotate_bytes()};
  for (const OpSpec& spec : *specs) {
    err << spec.op << ' ' << spec.Shape() << ' ' << spec.rows << " ... " << std::flush;
    run.results.push_back(MeasureOne(spec, flags, context, **measure));
    const OpResult& result = run.results.back();
    err << (result.error.empty() ? "ok" : result.error) << std::endl;
    if (const absl::Status status = (*ops)->Synchronize(); !status.ok()) return Fail(err, status, kWrong);
  }
  const std::string json = OpReportJson(run).dump(1) + "\n";
  out << (flags.json_file == "-" ? json : FormatOpReport(run)) << std::flush;
  if (!flags.json_file.empty() && flags.json_file != "-") {
    if (const absl::Status status = WriteFileAtomically(flags.json_file, json); !status.ok()) return Fail(err, status, kWrong);
  }
  return run.Failures() == 0 ? kOk : kWrong;
}

}  // namespace nibble
