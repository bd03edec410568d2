// Transforms and permutations do not change the function: logits before and after, by a forward pass of this test's
// own.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/base/check.h"
#include "tests/model/tiny_model.h"
#include "tools/quantize/dense_layer.h"
#include "tools/quantize/input_plan.h"

namespace nibble {
namespace {

using ::nibble::testing::TempDir;
using ::nibble::testing::TinyModel;
using ::nibble::testing::WriteTinyModel;
using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;  // [T, channels]

struct FloatModel {
  ModelConfig config;
  Matrix embedding;
  std::vector<Vector> input_norms, post_norms;
  Vector final_norm;
  std::vector<DenseLayer> layers;
  std::vector<float> head;  // [V, H]
};

FloatModel Load(const std::string& dir) {
  const auto checkpoint = Checkpoint::Open(dir);
  NIBBLE_CHECK(checkpoint.ok(), checkpoint.status().ToString());
  FloatModel model{.config = (*checkpoint)->config()};
  const int64_t h = model.config.hidden_size;
  const auto dense = [&](const std::string& name, const std::vector<int64_t>& shape) {
    const auto values = (*checkpoint)->Dense(name, shape);
    NIBBLE_CHECK(values.ok(), values.status().ToString());
    Vector out;
    for (const BF16 x : *values) out.push_back(ToFloat(x));
    return out;
  };
  const Vector table = dense("model.embed_tokens.weight", {model.config.vocab_size, h});
  for (int64_t v = 0; v < model.config.vocab_size; ++v)
    model.embedding.emplace_back(table.begin() + v * h, table.begin() + (v + 1) * h);
  for (int64_t i = 0; i < model.config.num_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i);
    model.input_norms.push_back(dense(prefix + ".input_layernorm.weight", {h}));
    model.post_norms.push_back(dense(prefix + ".post_attention_layernorm.weight", {h}));
    auto layer = LoadDenseLayer(**checkpoint, i);
    NIBBLE_CHECK(layer.ok(), layer.status().ToString());
    model.layers.push_back(*std::move(layer));
  }
  model.final_norm = dense("model.norm.weight", {h});
  const auto head = (*checkpoint)->Linear("lm_head", ShardAxis::kNone, 0, 1);
  for (const BF16 x : head->dense) model.head.push_back(ToFloat(x));
  return model;
}

Vector Normalized(const Vector& x, const Vector& weight, double eps) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  Vector out;
  for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] * scale * weight[i]);
  return out;
}

Vector Product(const std::vector<float>& weight, const std::vector<float>& bias, const Vector& x) {
  const size_t k = x.size(), n = weight.size() / k;
  Vector out(n);
  for (size_t row = 0; row < n; ++row) {
    double sum = bias.empty() ? 0.0 : static_cast<double>(bias[row]);
    for (size_t c = 0; c < k; ++c) sum += static_cast<double>(weight[row * k + c]) * x[c];
    out[row] = sum;
  }
  return out;
}

void Rotate(Vector* x, int64_t heads, int64_t d, int64_t position, double theta) {
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const double angle =
          static_cast<double>(position) * std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      double& a = (*x)[static_cast<size_t>(head * d + i)];
      double& b = (*x)[static_cast<size_t>(head * d + i + d / 2)];
      const double c = std::cos(angle), s = std::sin(angle), old = a;
      a = old * c - b * s;
      b = b * c + old * s;
    }
  }
}

// Logits [T, V]. `see` gets every linear input and may replace it, as permuted codes replace channels.
Matrix Logits(const FloatModel& model, const std::vector<int>& tokens,
              const std::function<Vector(size_t layer, LayerInput, const Vector&)>& see,
              std::vector<LayerStatistics>* keys = nullptr) {
  const ModelConfig& c = model.config;
  const int64_t d = c.head_dim, groups = c.num_query_groups();
  Matrix x;
  for (const int token : tokens) x.push_back(model.embedding[static_cast<size_t>(token)]);
  const auto linear = [&](size_t layer, LayerLinear which, const Vector& in) {
    const DenseLinear& l = model.layers[layer].linear(which);
    return Product(l.weight, l.bias, in);
  };
  const auto add = [](Vector* to, const Vector& delta) {
    for (size_t i = 0; i < to->size(); ++i) (*to)[i] += delta[i];
  };
  for (size_t layer = 0; layer < model.layers.size(); ++layer) {
    Matrix q, k, v;
    for (size_t t = 0; t < x.size(); ++t) {
      const Vector in = see(layer, LayerInput::kQkv, Normalized(x[t], model.input_norms[layer], c.rms_norm_eps));
      q.push_back(linear(layer, LayerLinear::kQ, in));
      k.push_back(linear(layer, LayerLinear::kK, in));
      v.push_back(linear(layer, LayerLinear::kV, in));
      Rotate(&q.back(), c.num_heads, d, static_cast<int64_t>(t), c.rope_theta);
      Rotate(&k.back(), c.num_kv_heads, d, static_cast<int64_t>(t), c.rope_theta);
      if (keys == nullptr) continue;
      std::vector<float>& max = (*keys)[layer].key_max;
      max.resize(k.back().size(), 0.0f);
      for (size_t i = 0; i < max.size(); ++i) max[i] = std::max(max[i], static_cast<float>(std::fabs(k.back()[i])));
    }
    for (size_t t = 0; t < x.size(); ++t) {
      Vector out;
      for (int64_t head = 0; head < c.num_heads; ++head) {
        const int64_t kv = head / groups;
        Vector weights;
        double total = 0;
        for (size_t s = 0; s <= t; ++s) {
          double dot = 0;
          for (int64_t i = 0; i < d; ++i)
            dot += q[t][static_cast<size_t>(head * d + i)] * k[s][static_cast<size_t>(kv * d + i)];
          weights.push_back(std::exp(dot / std::sqrt(static_cast<double>(d))));
          total += weights.back();
        }
        for (int64_t i = 0; i < d; ++i) {
          double sum = 0;
          for (size_t s = 0; s <= t; ++s) sum += weights[s] / total * v[s][static_cast<size_t>(kv * d + i)];
          out.push_back(sum);
        }
      }
      add(&x[t], linear(layer, LayerLinear::kO, see(layer, LayerInput::kO, out)));
      const Vector in = see(layer, LayerInput::kGateUp, Normalized(x[t], model.post_norms[layer], c.rms_norm_eps));
      Vector gate = linear(layer, LayerLinear::kGate, in);
      const Vector up = linear(layer, LayerLinear::kUp, in);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      add(&x[t], linear(layer, LayerLinear::kDown, see(layer, LayerInput::kDown, gate)));
    }
  }
  Matrix logits;
  for (const Vector& row : x)
    logits.push_back(Product(model.head, {}, Normalized(row, model.final_norm, c.rms_norm_eps)));
  return logits;
}

double LargestDifference(const Matrix& a, const Matrix& b) {
  double largest = 0;
  for (size_t t = 0; t < a.size(); ++t) {
    for (size_t i = 0; i < a[t].size(); ++i) largest = std::max(largest, std::fabs(a[t][i] - b[t][i]));
  }
  return largest;
}

class TransformTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status written =
        WriteTinyModel({.num_heads = 8, .num_kv_heads = 2, .vocab_size = 64, .attention_bias = true}, dir_ / "m");
    ASSERT_TRUE(written.ok()) << written;
    model_ = Load(dir_ / "m");
    statistics_.resize(model_.layers.size());
    before_ = Logits(model_, tokens_, unchanged_, &statistics_);
  }
  TempDir dir_;
  FloatModel model_;
  const std::vector<int> tokens_ = {3, 60, 12, 12, 7, 41, 0, 33};
  const std::function<Vector(size_t, LayerInput, const Vector&)> unchanged_ = [](size_t, LayerInput, const Vector& x) {
    return x;
  };
  std::vector<LayerStatistics> statistics_;
  Matrix before_;
};

TEST_F(TransformTest, SmoothAttentionKeepsTheFunction) {
  const std::vector<float> key_max = statistics_[0].key_max;
  std::vector<LayerStatistics> after_statistics(model_.layers.size());
  for (size_t i = 0; i < model_.layers.size(); ++i)
    SmoothAttention(0.6).Apply(model_.config, &statistics_[i], &model_.layers[i]);
  const Matrix after = Logits(model_, tokens_, unchanged_, &after_statistics);
  EXPECT_LT(LargestDifference(before_, after), 1e-4);

  // And it did something: keys are of one size now, as the updated statistics say.
  const auto spread = [](const std::vector<float>& max) {
    return *std::ranges::max_element(max) / *std::ranges::min_element(max);
  };
  EXPECT_LT(spread(after_statistics[0].key_max), 0.8 * spread(key_max));
  for (size_t i = 0; i < key_max.size(); ++i)
    EXPECT_NEAR(after_statistics[0].key_max[i], statistics_[0].key_max[i], 1e-4);
}

TEST_F(TransformTest, DefaultTransformsKeepTheFunction) {
  ASSERT_FALSE(DefaultTransforms().empty());
  for (const auto& transform : DefaultTransforms()) {
    for (size_t i = 0; i < model_.layers.size(); ++i)
      transform->Apply(model_.config, &statistics_[i], &model_.layers[i]);
  }
  EXPECT_LT(LargestDifference(before_, Logits(model_, tokens_, unchanged_)), 1e-4);
}

TEST_F(TransformTest, PermutationsKeepTheFunction) {
  std::vector<std::vector<InputPlan>> plans(model_.layers.size(), std::vector<InputPlan>(kLayerInputs));
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    for (size_t j = 0; j < kLayerInputs; ++j) {
      const LayerInput which = static_cast<LayerInput>(j);
      const bool rows = which == LayerInput::kO || which == LayerInput::kDown;
      plans[i][j] = PlanInput(ColumnEnergy(model_.layers[i], which), rows ? RowSegments(model_.config) : 1, 1);
    }
    for (size_t l = 0; l < kLayerLinears; ++l) {
      DenseLinear& linear = model_.layers[i].linears[l];
      const std::vector<int32_t>& perm = plans[i][static_cast<size_t>(InputOf(static_cast<LayerLinear>(l)))].perm;
      const std::vector<float> weight = linear.weight;
      const size_t k = perm.size();
      for (size_t n = 0; n < weight.size() / k; ++n) {
        for (size_t c = 0; c < k; ++c) linear.weight[n * k + c] = weight[n * k + static_cast<size_t>(perm[c])];
      }
    }
  }
  EXPECT_GT(LargestDifference(before_, Logits(model_, tokens_, unchanged_)), 1e-2);  // weights alone are not enough
  const Matrix after = Logits(model_, tokens_, [&](size_t layer, LayerInput which, const Vector& x) {
    Vector coded;
    for (const int32_t channel : plans[layer][static_cast<size_t>(which)].perm)
      coded.push_back(x[static_cast<size_t>(channel)]);
    return coded;
  });
  EXPECT_LT(LargestDifference(before_, after), 1e-4);
}

}  // namespace
}  // namespace nibble
