// One decoder layer at a time over calibration windows, on the operators that serve: the memory of a layer, whatever
// the model's size.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "kernels/ops.h"
#include "tools/quantize/calibration.h"
#include "tools/quantize/dense_layer.h"

namespace nibble {

// What a layer computes on the way; rows are valid during the call. Null: not wanted.
struct LayerTaps {
  // The rows [T, K] that the linears of this input read, before coding, in f32; only of layers loaded dense.
  std::function<absl::Status(LayerInput, std::span<const float> rows)> input;
  // Keys [T, Hkv·D] after RoPE, before coding; only of layers loaded dense.
  std::function<void(std::span<const float> keys)> keys;
};

class LayerRunner {
 public:
  // Windows have window_tokens tokens, and a Run takes at most windows_per_run of them. The operators are the CPU's:
  // they alone know f32 activations and pages.
  struct Options {
    int threads = 1;
    int64_t window_tokens = 0;
    int64_t windows_per_run = 4;
  };
  static absl::StatusOr<std::unique_ptr<LayerRunner>> Create(const ModelConfig& config, const Options& options);
  ~LayerRunner();

  // Makes this the layer that Run computes. Dense: weights rounded to bf16, activations and keys in f32.
  // down_hadamard: 0, or the size of the online Hadamard that its down_proj expects.
  absl::Status LoadDense(const DenseLayer& layer, int64_t down_hadamard);
  // Quantized: linears in the order of LayerLinear; coded inputs, KV4 pages, f32 activations in between.
  absl::Status LoadQuantized(const DenseLayer& norms, std::span<const LinearTensors> linears, int64_t down_hadamard);

  // hidden [windows · window_tokens, H], overwritten by the layer's output.
  absl::Status Run(std::span<float> hidden, const LayerTaps& taps);

  Ops& ops() { return *ops_; }
  int64_t rows_per_run() const { return options_.windows_per_run * options_.window_tokens; }

 private:
  struct Layer;
  LayerRunner(const ModelConfig& config, const Options& options);
  absl::Status Allocate();
  absl::Status LoadNorms(const DenseLayer& layer);
  absl::Status Tap(const LayerTaps& taps, LayerInput which, const LinearInput& input);
  void TapKeys(const LayerTaps& taps, int64_t rows);
  LinearInput Input(LayerInput which, int64_t rows);
  void Linear(LayerInput which, const LinearInput& input, const Rows& out);

  const ModelConfig config_;
  const Options options_;
  std::unique_ptr<Ops> ops_;
  Buffer rope_, positions_, row_sequence_, row_begin_, page_tables_;
  Buffer residual_, delta_, qkv_, attention_, gate_up_, dense_, codes_, scales_, code_sums_, pages_;
  std::unique_ptr<Layer> layer_;
  std::vector<float> host_;  // rows on their way to a tap
};

}  // namespace nibble
