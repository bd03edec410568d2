#include "tools/bench/op_report.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nibble {
namespace {

std::string Ratio(double baseline_us, double us) { return baseline_us == 0 ? "" : absl::StrFormat("%.2f", baseline_us / us); }

// Geometric means over the batch sizes of decoding, per model.
struct Means {
  double bf16 = 0, fp8 = 0, int8 = 0;  // sums of logarithms
  int cells = 0;
};

}  // namespace

int OpRun::Failures() const {
  return static_cast<int>(std::count_if(results.begin(), results.end(), [](const OpResult& r) { return !r.error.empty(); }));
}

std::string FormatOpReport(const OpRun& run) {
  std::string text = absl::StrFormat("%-18s %-16s %6s %10s %7s %8s %7s %6s %6s %7s %7s %7s\n", "operator", "shape", "rows",
                                     "us", "+-%", "GB/s", "TOPS", "limit%", "MHz", "x bf16", "x fp8", "x int8");
  std::map<std::string, Means> means;
  for (const OpResult& r : run.results) {
    if (r.us == 0) {
      absl::StrAppendFormat(&text, "%-18s %-16s %6d %10s  %s\n", r.spec.op, r.spec.Shape(), r.spec.rows, "-", r.error);
      continue;
    }
    absl::StrAppendFormat(
        &text, "%-18s %-16s %6d %10.2f %7.1f %8.0f %7s %6s %6s %7s %7s %7s%s\n", r.spec.op, r.spec.Shape(), r.spec.rows, r.us,
        100 * r.spread, r.bytes / r.us * 1e-3,
        r.operations == 0 ? "" : absl::StrFormat("%.*f", r.operations / r.us < 1e8 ? 2 : 0, r.operations / r.us * 1e-6),
        r.limit_us == 0 ? "" : absl::StrFormat("%.0f", 100 * r.limit_us / r.us),
        r.clock_mhz == 0 ? "" : absl::StrFormat("%.0f", r.clock_mhz), Ratio(r.bf16_us, r.us), Ratio(r.fp8_us, r.us),
        Ratio(r.int8_us, r.us), r.error.empty() ? "" : absl::StrCat("  WRONG: ", r.error));
    if (r.spec.op == "linear" && r.bf16_us != 0 && r.fp8_us != 0 && r.spec.rows >= 16 && r.spec.rows <= 256) {
      Means& m = means[r.spec.model.name];
      m.bf16 += std::log(r.bf16_us / r.us);
      m.fp8 += std::log(r.fp8_us / r.us);
      m.int8 += r.int8_us == 0 ? 0 : std::log(r.int8_us / r.us);
      ++m.cells;
    }
  }
  for (const auto& [model, m] : means) {
    absl::StrAppendFormat(&text, "linear %s, rows 16..256, geometric mean of %d: %.2f x bf16, %.2f x fp8, %.2f x int8\n", model,
                          m.cells, std::exp(m.bf16 / m.cells), std::exp(m.fp8 / m.cells), std::exp(m.int8 / m.cells));
  }
  absl::StrAppend(&text, run.backend);
  if (!run.device.empty()) {
    absl::StrAppendFormat(&text, "; driver for CUDA %s, built with %s; plain reads %.2f TB/s", run.driver, run.runtime,
                          run.read_bytes_per_second * 1e-12);
  }
  absl::StrAppendFormat(&text, "; nibble %s, %s\n", run.version, run.date);
  const int failures = run.Failures();
  absl::StrAppendFormat(&text, "%d results, %s\n", run.results.size(),
                        failures == 0 ? "every checked output right" : absl::StrCat(failures, " NOT right"));
  return text;
}

nlohmann::json OpReportJson(const OpRun& run) {
  nlohmann::json results = nlohmann::json::array();
  for (const OpResult& r : run.results) {
    nlohmann::json row = {{"op", r.spec.op},         {"shape", r.spec.Shape()}, {"model", r.spec.model.name},
                          {"variant", r.spec.variant}, {"rows", r.spec.rows},   {"us", r.us},
                          {"spread", r.spread},      {"clock_mhz", r.clock_mhz}, {"bytes", r.bytes},
                          {"operations", r.operations}, {"limit_us", r.limit_us}};
    row["unit"] = r.unit == OpUnit::kInt8 ? "int8" : r.unit == OpUnit::kBF16 ? "bf16" : "";
    if (r.bf16_us != 0) row["cublas_bf16_us"] = r.bf16_us;
    if (r.fp8_us != 0) row["cublas_fp8_us"] = r.fp8_us;
    if (r.int8_us != 0) row["cublas_int8_us"] = r.int8_us;
    if (!r.error.empty()) row["error"] = r.error;
    results.push_back(std::move(row));
  }
  return {{"date", run.date},     {"version", run.version}, {"command", run.command},
          {"backend", run.backend}, {"device", run.device}, {"driver_cuda", run.driver},
          {"runtime_cuda", run.runtime}, {"read_bytes_per_second", run.read_bytes_per_second},
          {"failures", run.Failures()}, {"results", std::move(results)}};
}

}  // namespace nibble
