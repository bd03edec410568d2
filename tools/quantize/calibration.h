// What the quantizer knows about activations: statistics of every linear's input, gathered while the float model reads
// a calibration text through the engine that serves.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"

namespace nibble {

// The four inputs of a layer's linears, in the order of the forward pass.
enum class LayerInput : uint8_t { kQkv, kO, kGateUp, kDown };
inline constexpr size_t kLayerInputs = 4;

struct InputStatistics {
  int64_t k = 0;
  std::vector<float> mean_square;  // [K] E[x²]
  std::vector<float> samples;      // [rows, K] rows spread over the whole text
  int64_t sample_rows() const { return k == 0 ? 0 : static_cast<int64_t>(samples.size()) / k; }
};

struct LayerStatistics {
  std::array<InputStatistics, kLayerInputs> inputs;
  InputStatistics& input(LayerInput which) { return inputs[static_cast<size_t>(which)]; }
  const InputStatistics& input(LayerInput which) const { return inputs[static_cast<size_t>(which)]; }

  std::vector<float> key_max;  // [Hkv, D] largest |k| after RoPE

  // How much of the residual stream attention and feed-forward write, mean over tokens of |delta|² / (|residual|² +
  // |delta|²): what a relative error of theirs is worth.
  double attention_share = 0;
  double mlp_share = 0;
};

struct CalibrationOptions {
  int64_t windows = 32;  // at most; fewer when the text is short
  int64_t min_windows = 4;
  int64_t window_tokens = 512;
  int64_t sample_rows = 1024;  // of each input
  int threads = 1;
};

// Windows spread evenly over the text, each with the tokenizer's first special token in front when it has one, as a
// request has. INVALID_ARGUMENT when the text has fewer tokens than min_windows windows, is not UTF-8, or has a token
// the model lacks. `tokenizer_dir` holds tokenizer.json.
absl::StatusOr<std::vector<std::vector<uint32_t>>> CalibrationWindows(const std::string& tokenizer_dir,
                                                                      const std::string& text_path, int64_t vocab_size,
                                                                      const CalibrationOptions& options);

// One entry per layer. The checkpoint is unquantized. progress(windows done) returns an error to stop.
absl::StatusOr<std::vector<LayerStatistics>> Calibrate(const Checkpoint& checkpoint,
                                                       std::span<const std::vector<uint32_t>> windows,
                                                       const CalibrationOptions& options,
                                                       const std::function<absl::Status(int64_t)>& progress);

}  // namespace nibble
