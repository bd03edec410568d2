#include "tools/quantize/dense_layer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {

LayerInput InputOf(LayerLinear which) {
  switch (which) {
    case LayerLinear::kQ:
    case LayerLinear::kK:
    case LayerLinear::kV:
      return LayerInput::kQkv;
    case LayerLinear::kO:
      return LayerInput::kO;
    case LayerLinear::kGate:
    case LayerLinear::kUp:
      return LayerInput::kGateUp;
    case LayerLinear::kDown:
      return LayerInput::kDown;
  }
  NIBBLE_CHECK(false, "not a linear of a layer");
}

absl::StatusOr<DenseLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t layer) {
  const std::vector<LinearShape> shapes = DecoderLinears(checkpoint.config());
  const std::string prefix = absl::StrCat("model.layers.", layer);
  const auto floats = [](const std::vector<BF16>& values) {
    std::vector<float> out(values.size());
    std::transform(values.begin(), values.end(), out.begin(), [](BF16 x) { return ToFloat(x); });
    return out;
  };
  const auto norm = [&](const char* name) -> absl::StatusOr<std::vector<float>> {
    const int64_t shape[] = {checkpoint.config().hidden_size};
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> values, checkpoint.Dense(prefix + name, shape));
    return floats(values);
  };
  DenseLayer out;
  NIBBLE_ASSIGN_OR_RETURN(out.input_norm, norm(".input_layernorm.weight"));
  NIBBLE_ASSIGN_OR_RETURN(out.post_attention_norm, norm(".post_attention_layernorm.weight"));
  for (size_t i = 0; i < kLayerLinears; ++i) {
    DenseLinear& linear = out.linears[i];
    linear.shape = shapes[static_cast<size_t>(layer) * kLayerLinears + i];
    NIBBLE_ASSIGN_OR_RETURN(LinearTensors tensors, checkpoint.Linear(linear.shape.name, ShardAxis::kNone, 0, 1));
    NIBBLE_CHECK(!tensors.quantized);
    linear.weight = floats(tensors.dense);
    linear.bias = std::move(tensors.bias);
  }
  return out;
}

std::vector<float> ColumnEnergy(const DenseLayer& layer, LayerInput which) {
  std::vector<float> energy;
  for (size_t i = 0; i < kLayerLinears; ++i) {
    if (InputOf(static_cast<LayerLinear>(i)) != which) continue;
    const DenseLinear& linear = layer.linears[i];
    energy.resize(static_cast<size_t>(linear.shape.k), 0.0f);
    for (int64_t n = 0; n < linear.shape.n; ++n) {
      const float* row = linear.weight.data() + n * linear.shape.k;
      for (int64_t c = 0; c < linear.shape.k; ++c) energy[static_cast<size_t>(c)] += row[c] * row[c];
    }
  }
  return energy;
}

}  // namespace nibble
