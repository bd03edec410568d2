#include "tools/quantize/transforms.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "common/base/check.h"
#include "common/model/checkpoint.h"

namespace nibble {
namespace {

constexpr int64_t kMaxDownHadamard = 512;
constexpr float kSmallest = 1e-5f;  // a channel that is always zero keeps its (zero) weights

std::span<float> Row(DenseLinear* linear, int64_t row) {
  return std::span(linear->weight)
      .subspan(static_cast<size_t>(row * linear->shape.k), static_cast<size_t>(linear->shape.k));
}

void ScaleRow(DenseLinear* linear, int64_t row, float factor) {
  for (float& w : Row(linear, row)) w *= factor;
  if (!linear->bias.empty()) linear->bias[static_cast<size_t>(row)] *= factor;
}

void ScaleColumns(std::span<const float> factors, DenseLinear* linear) {
  for (int64_t n = 0; n < linear->shape.n; ++n) {
    const std::span<float> row = Row(linear, n);
    for (size_t c = 0; c < row.size(); ++c) row[c] *= factors[c];
  }
}

template <typename T>
std::vector<T> Reordered(std::span<const T> values, std::span<const int32_t> order) {
  std::vector<T> out;
  out.reserve(order.size());
  for (const int32_t from : order) out.push_back(values[static_cast<size_t>(from)]);
  return out;
}

void ReorderColumns(std::span<const int32_t> order, std::vector<float>* rows) {
  for (size_t begin = 0; begin < rows->size(); begin += order.size()) {
    const std::span<float> row = std::span(*rows).subspan(begin, order.size());
    const std::vector<float> moved = Reordered<float>(row, order);
    std::copy(moved.begin(), moved.end(), row.begin());
  }
}

void ReorderRows(std::span<const int32_t> order, DenseLinear* linear) {
  std::vector<float> weight;
  weight.reserve(linear->weight.size());
  for (const int32_t from : order) {
    const std::span<float> row = Row(linear, from);
    weight.insert(weight.end(), row.begin(), row.end());
  }
  linear->weight = std::move(weight);
  if (!linear->bias.empty()) linear->bias = Reordered<float>(linear->bias, order);
}

void RotateSamples(int64_t size, InputStatistics* input) {
  HadamardBlocks(size, input->samples);
  input->mean_square = MeanSquare(input->samples, input->k);
}

void DivideSamples(std::span<const float> factors, InputStatistics* input) {
  for (size_t i = 0; i < input->samples.size(); ++i) input->samples[i] /= factors[i % factors.size()];
  for (size_t c = 0; c < factors.size(); ++c) input->mean_square[c] /= factors[c] * factors[c];
}

}  // namespace

void FoldNorms(DenseLayer* layer) {
  for (const LayerLinear which : {LayerLinear::kQ, LayerLinear::kK, LayerLinear::kV})
    ScaleColumns(layer->input_norm, &layer->linear(which));
  for (const LayerLinear which : {LayerLinear::kGate, LayerLinear::kUp})
    ScaleColumns(layer->post_attention_norm, &layer->linear(which));
  std::fill(layer->input_norm.begin(), layer->input_norm.end(), 1.0f);
  std::fill(layer->post_attention_norm.begin(), layer->post_attention_norm.end(), 1.0f);
}

void RotateResidual(const Rotation& rotation, DenseLayer* layer, ThreadPool* pool) {
  for (size_t i = 0; i < kLayerLinears; ++i) {
    DenseLinear& linear = layer->linears[i];
    const LayerInput input = InputOf(static_cast<LayerLinear>(i));
    if (input == LayerInput::kQkv || input == LayerInput::kGateUp) {
      rotation.ApplyToRows(linear.weight, pool);
    } else {
      rotation.ApplyToColumns(linear.weight, linear.shape.k, pool);
      if (!linear.bias.empty()) rotation.ApplyToRows(linear.bias, pool);
    }
  }
}

void RotateHeads(const ModelConfig& config, LayerStatistics* statistics, DenseLayer* layer) {
  const int64_t d = config.head_dim;
  DenseLinear& v = layer->linear(LayerLinear::kV);
  std::vector<float> column(static_cast<size_t>(v.shape.n));
  for (int64_t c = 0; c < v.shape.k; ++c) {
    for (int64_t n = 0; n < v.shape.n; ++n) column[static_cast<size_t>(n)] = Row(&v, n)[static_cast<size_t>(c)];
    HadamardBlocks(d, column);
    for (int64_t n = 0; n < v.shape.n; ++n) Row(&v, n)[static_cast<size_t>(c)] = column[static_cast<size_t>(n)];
  }
  if (!v.bias.empty()) HadamardBlocks(d, v.bias);
  DenseLinear& o = layer->linear(LayerLinear::kO);
  for (int64_t n = 0; n < o.shape.n; ++n) HadamardBlocks(d, Row(&o, n));
  RotateSamples(d, &statistics->input(LayerInput::kO));
}

void SmoothAttention(const ModelConfig& config, double alpha, LayerStatistics* statistics, DenseLayer* layer) {
  const int64_t d = config.head_dim, half = d / 2, groups = config.num_query_groups();
  NIBBLE_CHECK_EQ(static_cast<int64_t>(statistics->key_max.size()), config.num_kv_heads * d);
  for (int64_t head = 0; head < config.num_kv_heads; ++head) {
    float* key_max = statistics->key_max.data() + head * d;
    for (int64_t pair = 0; pair < half; ++pair) {
      const float largest = std::max({key_max[pair], key_max[pair + half], kSmallest});
      const float lambda = static_cast<float>(std::pow(static_cast<double>(largest), alpha));
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

void SmoothOutputs(const ModelConfig& config, double alpha, bool heads_rotated, bool down_rotated,
                   LayerStatistics* statistics, DenseLayer* layer) {
  const auto sizes = [](std::span<const float> rows, int64_t k, bool rotated) {
    if (!rotated) return ChannelMax(rows, k);
    std::vector<float> size = MeanSquare(rows, k);
    for (float& x : size) x = std::sqrt(x);
    return size;
  };
  const auto lambda = [&](float input, float weight) {
    const double x = std::max(input, kSmallest), w = std::max(weight, kSmallest);
    return static_cast<float>(std::pow(x, alpha) / std::pow(w, 1 - alpha));
  };
  // Value channel d of a KV head is channel d of every query head in its group.
  DenseLinear& o = layer->linear(LayerLinear::kO);
  InputStatistics& attention = statistics->input(LayerInput::kO);
  const std::vector<float> x = sizes(attention.samples, o.shape.k, heads_rotated);
  const std::vector<float> w = sizes(o.weight, o.shape.k, heads_rotated);
  const int64_t d = config.head_dim, groups = config.num_query_groups();
  std::vector<float> factors(x.size());
  for (int64_t channel = 0; channel < config.num_kv_heads * d; ++channel) {
    const int64_t first = channel / d * groups * d + channel % d;
    float input = 0, weight = 0;
    for (int64_t i = first; i < first + groups * d; i += d) {
      input = std::max(input, x[static_cast<size_t>(i)]);
      weight = std::max(weight, w[static_cast<size_t>(i)]);
    }
    const float factor = lambda(input, weight);
    for (int64_t i = first; i < first + groups * d; i += d) factors[static_cast<size_t>(i)] = factor;
    ScaleRow(&layer->linear(LayerLinear::kV), channel, 1 / factor);
  }
  ScaleColumns(factors, &o);
  DivideSamples(factors, &attention);

  DenseLinear& down = layer->linear(LayerLinear::kDown);
  InputStatistics& mlp = statistics->input(LayerInput::kDown);
  const std::vector<float> h = sizes(mlp.samples, down.shape.k, down_rotated);
  const std::vector<float> u = sizes(down.weight, down.shape.k, down_rotated);
  factors.resize(h.size());
  for (size_t c = 0; c < factors.size(); ++c) {
    factors[c] = lambda(h[c], u[c]);
    ScaleRow(&layer->linear(LayerLinear::kUp), static_cast<int64_t>(c), 1 / factors[c]);
  }
  ScaleColumns(factors, &down);
  DivideSamples(factors, &mlp);
}

void SortNeurons(int64_t segments, int64_t unit, LayerStatistics* statistics, DenseLayer* layer) {
  InputStatistics& input = statistics->input(LayerInput::kDown);
  NIBBLE_CHECK_EQ(input.k % (segments * unit), 0);
  std::vector<float> contribution = ColumnEnergy(*layer, LayerInput::kDown);
  for (size_t c = 0; c < contribution.size(); ++c) contribution[c] *= input.mean_square[c];
  std::vector<int32_t> falling(contribution.size());
  std::iota(falling.begin(), falling.end(), 0);
  std::stable_sort(falling.begin(), falling.end(), [&](int32_t a, int32_t b) {
    return contribution[static_cast<size_t>(a)] > contribution[static_cast<size_t>(b)];
  });
  std::vector<int32_t> order(falling.size());
  const int64_t units_per_segment = input.k / (segments * unit);
  for (int64_t i = 0; i < input.k; ++i) {
    const int64_t dealt = i / unit;
    const int64_t place = (dealt % segments * units_per_segment + dealt / segments) * unit + i % unit;
    order[static_cast<size_t>(place)] = falling[static_cast<size_t>(i)];
  }
  ReorderRows(order, &layer->linear(LayerLinear::kGate));
  ReorderRows(order, &layer->linear(LayerLinear::kUp));
  ReorderColumns(order, &layer->linear(LayerLinear::kDown).weight);
  ReorderColumns(order, &input.samples);
  input.mean_square = Reordered<float>(input.mean_square, order);
}

void RotateDown(int64_t size, LayerStatistics* statistics, DenseLayer* layer) {
  DenseLinear& down = layer->linear(LayerLinear::kDown);
  for (int64_t n = 0; n < down.shape.n; ++n) HadamardBlocks(size, Row(&down, n));
  RotateSamples(size, &statistics->input(LayerInput::kDown));
}

int64_t DownHadamardSize(const ModelConfig& config) {
  return std::min(kMaxDownHadamard, PowerOfTwoPart(config.intermediate_size / RowSegments(config)));
}

}  // namespace nibble
