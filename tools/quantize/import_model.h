// `nibble-quantize import`: a checkpoint that AutoGPTQ or AutoAWQ quantized (4 bits, groups of 128) in, a w4a8kv4
// checkpoint of Nibble's out, without calibration. Activations get 8 bits: which blocks could do with 4 only a
// calibration of the unquantized model can tell.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nibble {

struct ImportOptions {
  std::string model;
  std::string output;
  bool overwrite = false;
  // Refused when the weights of a linear move further than this, root mean square, in steps of its groups; the source's
  // own rounding is worth 0.29.
  double max_rms_steps = 0.15;
  int64_t max_shard_bytes = int64_t{4} << 30;
  int threads = 1;
};

struct ImportReport {
  std::string method;  // "gptq" or "awq"
  int64_t linears = 0;
  int64_t exact = 0;     // linears whose weights are the source's
  double rms_steps = 0;  // of the others, worst linear
  std::string worst;     // its name
  int64_t output_bytes = 0;
};

// progress(linears done, of) returns an error to stop; nothing is left behind then. UNIMPLEMENTED with file or tensor,
// field, value and reason for what the grid or this program cannot represent; other errors as of SafeTensors,
// LoadModelConfig and ModelWriter.
absl::StatusOr<ImportReport> ImportModel(const ImportOptions& options,
                                         const std::function<absl::Status(int64_t, int64_t)>& progress);

}  // namespace nibble
