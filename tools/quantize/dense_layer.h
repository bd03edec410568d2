// A decoder layer's linears in f32, between checkpoint and quantized tensors, and the function-preserving transforms
// applied to them in order.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "common/model/config.h"
#include "tools/quantize/calibration.h"

namespace nibble {

// In the order of DecoderLinears.
enum class LayerLinear : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr size_t kLayerLinears = 7;

// Which input a linear reads.
LayerInput InputOf(LayerLinear which);

struct DenseLinear {
  LinearShape shape;
  std::vector<float> weight;  // [N, K]
  std::vector<float> bias;    // [N] or empty
};

struct DenseLayer {
  std::array<DenseLinear, kLayerLinears> linears;
  DenseLinear& linear(LayerLinear which) { return linears[static_cast<size_t>(which)]; }
  const DenseLinear& linear(LayerLinear which) const { return linears[static_cast<size_t>(which)]; }
};

absl::StatusOr<DenseLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t layer);

// Σ over the rows of all linears that read `which` of W[:, k]²: how much an error of input channel k is amplified.
std::vector<float> ColumnEnergy(const DenseLayer& layer, LayerInput which);

// Rewrites a layer so that the model's function stays the same and the layer quantizes better. Transforms run in order,
// between calibration and coding; one that changes what a linear reads updates the statistics with it. Rotations of the
// residual stream and error-compensating rounding have their place here and in QuantizeLinear.
class Transform {
 public:
  virtual ~Transform() = default;
  virtual std::string_view name() const = 0;  // recorded in the checkpoint
  virtual void Apply(const ModelConfig& config, LayerStatistics* statistics, DenseLayer* layer) const = 0;
};

std::vector<std::unique_ptr<Transform>> DefaultTransforms();

// SmoothAttention (QServe, section 4.2): keys have channels far larger than the rest, which four bits shared by a head
// represent badly. Every RoPE pair of key channels is divided by λ = max|k|^alpha and the queries that meet it are
// multiplied, so q·k is unchanged: the pair shares λ because RoPE mixes it, the query heads of a group because they
// share the key head.
class SmoothAttention : public Transform {
 public:
  explicit SmoothAttention(double alpha) : alpha_(alpha) {}
  std::string_view name() const override { return "smooth_attention"; }
  void Apply(const ModelConfig& config, LayerStatistics* statistics, DenseLayer* layer) const override;

 private:
  const double alpha_;
};

}  // namespace nibble
