// The result of `nibble-bench op` for people and for programs (tools/plots/op_plots.py).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/bench/op_case.h"

namespace nibble {

struct OpResult {
  OpSpec spec;
  double us = 0, spread = 0, clock_mhz = 0;
  double bytes = 0, operations = 0;
  OpUnit unit = OpUnit::kNone;
  double limit_us = 0;                           // what memory and matrix units allow; 0: not known
  double bf16_us = 0, fp8_us = 0, int8_us = 0;   // cuBLASLt on the same shape; 0: not measured
  std::string error;                             // why there is no time, or what the check found
};

struct OpRun {
  std::string date, version, command, backend;  // UTC "20261122-201500"; what Ops::Describe says
  std::string device, driver, runtime;          // empty on CPUs
  double read_bytes_per_second = 0;
  std::vector<OpResult> results;

  int Failures() const;
};

std::string FormatOpReport(const OpRun& run);
nlohmann::json OpReportJson(const OpRun& run);

}  // namespace nibble
