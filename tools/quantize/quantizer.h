// nibble-quantize without its command line: an HF model directory in, a quantized one out. docs/quantization.md tells
// what the steps do, docs/formats.md what is written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "tools/quantize/calibration.h"
#include "tools/quantize/settings.h"

namespace nibble {

struct QuantizeOptions {
  std::string model;  // source directory, unquantized
  std::string output;
  Quantization mode = Quantization::kW4A4KV4;
  std::string calibration;  // text file; not read in mode bf16
  bool overwrite = false;
  bool resume = false;  // continue what an interrupted run with the same options left in OUTPUT.work
  QuantizeSettings settings;
  std::string device = "cpu";  // or "cuda": of Hessians and of rounding
  int threads = 1;
  int64_t max_shard_bytes = int64_t{4} << 30;
  CalibrationOptions calibration_options;
};

// Hears of the work, in the calling thread. Returning an error stops it (an interrupt); layers finished by then stay in
// OUTPUT.work.
class QuantizeListener {
 public:
  virtual ~QuantizeListener() = default;
  // Before the work begins.
  virtual void Planned(int64_t predicted_peak_bytes, int64_t layers_done, int64_t layers) {}
  // done of steps are done; `next` names the step to come ("layer 3 down_proj").
  virtual absl::Status Advanced(int64_t done, int64_t steps, const std::string& next) { return absl::OkStatus(); }
};

struct QuantizeReport {
  int64_t blocks = 0;  // 128-blocks of activations, every linear input of every layer
  int64_t eight_bit_blocks = 0;
  std::vector<int64_t> eight_bit_per_input;  // layer by layer: qkv, o, gate/up, down
  int64_t source_bytes = 0;                  // of tensors
  int64_t output_bytes = 0;
};

// INVALID_ARGUMENT for a model, text or option that cannot be used, ALREADY_EXISTS / FAILED_PRECONDITION /
// RESOURCE_EXHAUSTED for the output as ModelWriter says, FAILED_PRECONDITION for an OUTPUT.work that is not to be
// continued. The output appears whole or not at all, and is the same bytes however often the work was interrupted.
absl::StatusOr<QuantizeReport> QuantizeModel(const QuantizeOptions& options, QuantizeListener* listener);

}  // namespace nibble
