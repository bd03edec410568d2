// The quantizer's work on one layer, and what the layers share: the basis of the residual stream, and the calibration
// text's hidden states that flow from layer to layer.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/thread_pool.h"
#include "common/model/checkpoint.h"
#include "tools/quantize/gptq.h"
#include "tools/quantize/layer_runner.h"
#include "tools/quantize/rotation.h"
#include "tools/quantize/settings.h"

namespace nibble {

struct QuantizedLayer {
  std::vector<float> input_norm, post_attention_norm;  // [H]
  std::array<LinearTensors, kLayerLinears> linears;
  std::array<double, kLayerInputs> coding_error = {};       // of each input, relative to its linears' output
  std::array<RoundingReport, kLayerLinears> rounding = {};  // of each linear, and
  std::array<double, kLayerLinears> weight_error = {};      // |W - Ŵ| / |W|, Frobenius norms
};

struct LayerQuantizerOptions {
  Quantization mode = Quantization::kW4A4KV4;  // not kBF16
  QuantizeSettings settings;
  std::string device = "cpu";  // or "cuda": of Hessians and of rounding; layers run on the CPU
  int threads = 1;
  int64_t sample_rows = 2048;  // of each input, for transforms and plans
};

class LayerQuantizer {
 public:
  // Windows have one length. INVALID_ARGUMENT for a model that cannot be quantized. source outlives this.
  static absl::StatusOr<std::unique_ptr<LayerQuantizer>> Create(const Checkpoint& source,
                                                                std::vector<std::vector<uint32_t>> windows,
                                                                const LayerQuantizerOptions& options);

  // Called between pieces of work, with what comes next; an error stops.
  using Step = std::function<absl::Status(const std::string& next)>;
  int64_t steps_of_survey() const;
  int64_t steps_per_layer() const;

  // The residual stream's basis, as the settings want it. Reads the whole model once when it depends on data
  // (steps_of_survey() is then positive); `basis` [H, H] of an earlier survey, when not empty, spares that.
  absl::Status Survey(std::span<const float> basis, const Step& step);
  std::span<const float> basis() const;  // empty when the rotation does not depend on data

  // Embeddings of the windows, [windows · window_tokens, H].
  absl::StatusOr<std::vector<float>> FirstHidden() const;

  // Quantizes a layer; `hidden` is what it reads and becomes what the next one reads.
  absl::StatusOr<QuantizedLayer> Quantize(int64_t layer, std::vector<float>* hidden, const Step& step);

  // Of the quantized model: the head is no longer tied when the embedding and it are rotated differently.
  const ModelConfig& config() const { return config_; }
  absl::StatusOr<std::vector<BF16>> Embedding() const;  // [V, H]
  absl::StatusOr<std::vector<BF16>> Head() const;       // [V, H]
  absl::StatusOr<std::vector<BF16>> FinalNorm() const;  // [H]
  std::vector<std::string> Transforms() const;          // names, in order

  // What Quantize needs at most, apart from mapped files: an upper bound by counting.
  int64_t PredictedPeakBytes() const;

 private:
  LayerQuantizer(const Checkpoint& source, std::vector<std::vector<uint32_t>> windows,
                 const LayerQuantizerOptions& options);

  using Plans = std::array<InputPlan, kLayerInputs>;
  using Moments = std::array<std::unique_ptr<InputMoments>, kLayerInputs>;

  bool RotatesResidual() const { return options_.settings.rotate_residual != ResidualRotation::kOff; }
  bool NeedsSurvey() const;
  int64_t EightBitBlocks(int64_t k) const;
  absl::StatusOr<std::vector<float>> Embed(const std::vector<std::vector<uint32_t>>& windows) const;
  // Rows of a table [*, H], columns scaled, in the residual's basis.
  absl::StatusOr<std::vector<BF16>> RotatedRows(std::vector<BF16> values, std::span<const BF16> column_scale) const;
  // Adds the rows of the linears that read `input`, scaled to kWeightShare of the inputs' energy: coding costs the
  // output (energy of the 4-bit part) · (energy of its weight columns), and both should be small.
  absl::Status SurveyWeights(const DenseLayer& layer, LayerInput input, double energy, InputMoments* moments);
  absl::StatusOr<LayerStatistics> Scout(const DenseLayer& layer, const std::vector<float>& hidden);
  absl::StatusOr<InputPlan> Plan(const DenseLayer& layer, const LayerStatistics& statistics, LayerInput which,
                                 double* coding_error);
  absl::StatusOr<Moments> Accumulate(const DenseLayer& layer, const Plans& plans, std::vector<float>* hidden,
                                     const Step& step);
  absl::Status Flow(std::vector<float>* hidden, const LayerTaps& taps, const Step& step);
  GptqOptions Rounding() const;

  const Checkpoint& source_;
  const std::vector<std::vector<uint32_t>> windows_;
  const LayerQuantizerOptions options_;
  const int64_t window_tokens_;
  ModelConfig config_;
  mutable ThreadPool pool_;
  std::unique_ptr<LayerRunner> runner_;
  std::unique_ptr<RoundingDevice> rounding_;
  std::unique_ptr<Rotation> rotation_;  // of the residual, or null
};

}  // namespace nibble
