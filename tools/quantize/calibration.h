// The text that a model is calibrated on, and what is kept of the activations it causes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

// The four inputs of a layer's linears, in the order of the forward pass.
enum class LayerInput : uint8_t { kQkv, kO, kGateUp, kDown };
inline constexpr size_t kLayerInputs = 4;

// Of the rows in `samples`.
struct InputStatistics {
  int64_t k = 0;
  std::vector<float> mean_square;  // [K] E[x²]
  std::vector<float> samples;      // [rows, K] rows spread over the text
  int64_t sample_rows() const { return k == 0 ? 0 : static_cast<int64_t>(samples.size()) / k; }
};

// E[x²] and the largest |x| of every channel of rows [*, K].
std::vector<float> MeanSquare(std::span<const float> rows, int64_t k);
std::vector<float> ChannelMax(std::span<const float> rows, int64_t k);

struct LayerStatistics {
  std::array<InputStatistics, kLayerInputs> inputs;
  InputStatistics& input(LayerInput which) { return inputs[static_cast<size_t>(which)]; }
  const InputStatistics& input(LayerInput which) const { return inputs[static_cast<size_t>(which)]; }

  std::vector<float> key_max;  // [Hkv, D] largest |k| after RoPE
};

struct CalibrationOptions {
  int64_t windows = 64;  // at most; fewer when the text is short
  int64_t min_windows = 4;
  int64_t window_tokens = 512;
  int64_t sample_rows = 2048;  // of each input, for what is planned before a layer is calibrated in full
};

// Windows spread evenly over the text, each with the tokenizer's first special token in front when it has one, as a
// request has. INVALID_ARGUMENT when the text has fewer tokens than min_windows windows, is not UTF-8, or has a token
// the model lacks. `tokenizer_dir` holds tokenizer.json.
absl::StatusOr<std::vector<std::vector<uint32_t>>> CalibrationWindows(const std::string& tokenizer_dir,
                                                                      const std::string& text_path, int64_t vocab_size,
                                                                      const CalibrationOptions& options);

}  // namespace nibble
