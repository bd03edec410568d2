// A decoder layer in f32, between checkpoint and quantized tensors.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
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
  std::vector<float> input_norm, post_attention_norm;  // [H]
  std::array<DenseLinear, kLayerLinears> linears;
  DenseLinear& linear(LayerLinear which) { return linears[static_cast<size_t>(which)]; }
  const DenseLinear& linear(LayerLinear which) const { return linears[static_cast<size_t>(which)]; }
};

absl::StatusOr<DenseLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t layer);

// Σ over the rows of all linears that read `which` of W[:, k]²: how much an error of input channel k is amplified.
std::vector<float> ColumnEnergy(const DenseLayer& layer, LayerInput which);

}  // namespace nibble
