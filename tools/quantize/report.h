// What quantizing did to a model: errors of every linear, 8-bit blocks, outliers before and after, sizes, and
// perplexity against the float model, as text, JSON and one HTML page.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "tools/eval/divergence.h"

namespace nibble {

struct ReportOptions {
  std::string model;      // unquantized
  std::string quantized;  // made from it
  std::string text;       // optional: read by both for perplexity and for the picture of outliers
  int64_t window = 512;
  int64_t max_windows = 40;
  int threads = 1;
};

// One coded input of a layer; q, k, v share one, so do gate and up.
struct InputReport {
  std::string name;                 // "qkv", "o", "gate_up", "down"
  std::vector<uint8_t> block_bits;  // [K/128]
  // Largest |x| of a channel, of all tokens read, relative to the median channel; neighbours are joined to at most
  // kPictureBins values by their maximum. Empty without a text.
  std::vector<float> before;  // the float model's, in channel order
  std::vector<float> after;   // what the quantized model multiplies, in code order
  double before_peak = 0, after_peak = 0;  // the largest of them

  int64_t eight_bit_blocks() const;
};
inline constexpr size_t kPictureBins = 128;

struct LinearReport {
  std::string name;  // "q", "k", "v", "o", "gate", "up", "down"
  std::optional<double> weight_error, output_error;  // relative; absent when the quantizer recorded none
  std::string fallback;
};

struct LayerReport {
  std::vector<LinearReport> linears;
  std::vector<InputReport> inputs;
};

struct QuantizationReport {
  std::string model, quantized, mode;
  std::map<std::string, std::string> settings;  // quantization_config, fields with one value
  std::vector<LayerReport> layers;
  int64_t parameters = 0;
  struct Size {
    std::string part;  // "linears", "embedding and head", "norms"
    int64_t float_bytes = 0, quantized_bytes = 0;
  };
  std::vector<Size> sizes;
  int64_t float_kv_bytes_per_token = 0;  // in bf16, all layers
  int64_t kv_bytes_per_token = 0;
  std::optional<DivergenceReport> divergence;  // with a text
  int64_t window = 0;

  int64_t blocks() const;
  int64_t eight_bit_blocks() const;
  int64_t float_bytes() const;
  int64_t quantized_bytes() const;
};

// With a text both models are in memory. INVALID_ARGUMENT when `quantized` is not a quantized model of the shape of
// `model`, or the text has no window. progress hears of windows read.
absl::StatusOr<QuantizationReport> BuildReport(const ReportOptions& options,
                                               const std::function<void(int64_t done, int64_t total)>& progress);

std::string FormatReport(const QuantizationReport& report);
nlohmann::json ReportJson(const QuantizationReport& report);
// One self-contained page: inline SVG, no scripts, follows the reader's light or dark theme.
std::string ReportHtml(const QuantizationReport& report);

}  // namespace nibble
