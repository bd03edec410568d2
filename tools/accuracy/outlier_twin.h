// A model's twin: the same function, with the outliers that large models have and small ones lack. Quantizers that only
// work on tame activations fail on it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace nibble {

struct OutlierOptions {
  std::string model;   // unquantized
  std::string output;  // directory to create
  bool overwrite = false;
  uint64_t seed = 5;
  int64_t channels = 6;  // of each norm, and of each up_proj
  double factor = 30;    // outliers are 0.5 to 1.5 times it
  int64_t key_pairs = 2;  // RoPE pairs of every key head
  float key_factor = 8;
};

// In every layer: `channels` channels of both norms grow and the columns that read them shrink by the same; `channels`
// rows of up_proj grow and the columns of down_proj shrink; `key_pairs` RoPE pairs of every key head grow and those of
// its query heads shrink. Factors are what bf16 makes of them, so only the shrunk columns are rounded anew. Same bytes
// for the same seed on every machine. INVALID_ARGUMENT for a quantized model or counts out of range; else errors of
// Checkpoint and ModelWriter.
absl::Status WriteOutlierTwin(const OutlierOptions& options);

}  // namespace nibble
