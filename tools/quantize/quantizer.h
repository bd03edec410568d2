// nibble-quantize without its command line: an HF model directory in, a quantized one out. docs/quantization.md tells
// what the steps do, docs/formats.md what is written.
#pragma once

#include <cstdint>
#include <functional>
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
  QuantizeSettings settings;
  int64_t max_shard_bytes = int64_t{4} << 30;
  CalibrationOptions calibration_options;
};

// Hears of the work, in the calling thread. Returning an error stops it (an interrupt); nothing is left behind.
class QuantizeListener {
 public:
  virtual ~QuantizeListener() = default;
  virtual absl::Status Calibrated(int64_t windows_done, int64_t windows) { return absl::OkStatus(); }
  virtual absl::Status Quantized(int64_t tensors_done, int64_t tensors, const std::string& name) {
    return absl::OkStatus();
  }
};

struct QuantizeReport {
  int64_t blocks = 0;  // 128-blocks of activations, every linear input of every layer
  int64_t eight_bit_blocks = 0;
  std::vector<int64_t> eight_bit_per_input;  // layer by layer: qkv, o, gate/up, down
  int64_t source_bytes = 0;                  // of tensors
  int64_t output_bytes = 0;
};

// INVALID_ARGUMENT for a model, text or option that cannot be used, ALREADY_EXISTS / FAILED_PRECONDITION /
// RESOURCE_EXHAUSTED for the output as ModelWriter says. The output appears whole or not at all.
absl::StatusOr<QuantizeReport> QuantizeModel(const QuantizeOptions& options, QuantizeListener* listener);

}  // namespace nibble
