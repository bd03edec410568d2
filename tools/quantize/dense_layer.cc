#include "tools/quantize/dense_layer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {
namespace {

// Chosen on calibration text alone, by the perplexity of a slice of it that statistics were not taken from.
constexpr double kSmoothAttentionAlpha = 0.6;

void ScaleRow(DenseLinear* linear, int64_t row, float factor) {
  float* weight = linear->weight.data() + row * linear->shape.k;
  for (int64_t c = 0; c < linear->shape.k; ++c) weight[c] *= factor;
  if (!linear->bias.empty()) linear->bias[static_cast<size_t>(row)] *= factor;
}

}  // namespace

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
  DenseLayer out;
  for (size_t i = 0; i < kLayerLinears; ++i) {
    DenseLinear& linear = out.linears[i];
    linear.shape = shapes[static_cast<size_t>(layer) * kLayerLinears + i];
    NIBBLE_ASSIGN_OR_RETURN(LinearTensors tensors, checkpoint.Linear(linear.shape.name, ShardAxis::kNone, 0, 1));
    NIBBLE_CHECK(!tensors.quantized);
    linear.weight.resize(tensors.dense.size());
    std::transform(tensors.dense.begin(), tensors.dense.end(), linear.weight.begin(),
                   [](BF16 x) { return ToFloat(x); });
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

std::vector<std::unique_ptr<Transform>> DefaultTransforms() {
  std::vector<std::unique_ptr<Transform>> transforms;
  transforms.push_back(std::make_unique<SmoothAttention>(kSmoothAttentionAlpha));
  return transforms;
}

void SmoothAttention::Apply(const ModelConfig& config, LayerStatistics* statistics, DenseLayer* layer) const {
  const int64_t d = config.head_dim, half = d / 2, groups = config.num_query_groups();
  NIBBLE_CHECK_EQ(static_cast<int64_t>(statistics->key_max.size()), config.num_kv_heads * d);
  constexpr float kSmallestKey = 1e-5f;  // a channel that is always zero keeps its (zero) weights
  for (int64_t head = 0; head < config.num_kv_heads; ++head) {
    float* key_max = statistics->key_max.data() + head * d;
    for (int64_t pair = 0; pair < half; ++pair) {
      const float largest = std::max({key_max[pair], key_max[pair + half], kSmallestKey});
      const float lambda = static_cast<float>(std::pow(static_cast<double>(largest), alpha_));
      for (const int64_t channel : {pair, pair + half}) {
        ScaleRow(&layer->linear(LayerLinear::kK), head * d + channel, 1 / lambda);
        for (int64_t group = 0; group < groups; ++group) {
          ScaleRow(&layer->linear(LayerLinear::kQ), (head * groups + group) * d + channel, lambda);
        }
        key_max[channel] /= lambda;
      }
    }
  }
}

}  // namespace nibble
