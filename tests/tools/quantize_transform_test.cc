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
#include "tools/quantize/transforms.h"

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
    auto layer = LoadDenseLayer(**checkpoint, i);
    NIBBLE_CHECK(layer.ok(), layer.status().ToString());
    model.layers.push_back(*std::move(layer));
  }
  model.final_norm = dense("model.norm.weight", {h});
  const auto head = (*checkpoint)->Linear("lm_head", ShardAxis::kNone, 0, 1);
  for (const BF16 x : head->dense) model.head.push_back(ToFloat(x));
  return model;
}

template <typename T>
Vector Normalized(const Vector& x, const std::vector<T>& weight, double eps) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  Vector out;
  for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] * scale * static_cast<double>(weight[i]));
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
      const Vector in = see(layer, LayerInput::kQkv, Normalized(x[t], model.layers[layer].input_norm, c.rms_norm_eps));
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
      const Vector in =
          see(layer, LayerInput::kGateUp, Normalized(x[t], model.layers[layer].post_attention_norm, c.rms_norm_eps));
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
    before_ = Logits(model_, tokens_, unchanged_);
    statistics_ = Observe(0);
  }

  // What LayerStatistics say about the model as it is, with online Hadamards of this size in front of down_proj.
  std::vector<LayerStatistics> Observe(int64_t down_hadamard, Matrix* logits = nullptr) {
    std::vector<LayerStatistics> statistics(model_.layers.size());
    const Matrix result = Logits(
        model_, tokens_,
        [&](size_t layer, LayerInput which, const Vector& x) {
          std::vector<float> row(x.begin(), x.end());
          if (which == LayerInput::kDown && down_hadamard > 0) HadamardBlocks(down_hadamard, row);
          InputStatistics& input = statistics[layer].input(which);
          input.k = static_cast<int64_t>(row.size());
          input.samples.insert(input.samples.end(), row.begin(), row.end());
          return Vector(row.begin(), row.end());
        },
        &statistics);
    for (LayerStatistics& layer : statistics) {
      for (InputStatistics& input : layer.inputs) input.mean_square = MeanSquare(input.samples, input.k);
    }
    if (logits != nullptr) *logits = result;
    return statistics;
  }

  // The logits are what they were, and statistics_ what the transformed model's inputs are.
  void ExpectFunctionAndStatisticsKept(int64_t down_hadamard) {
    Matrix after;
    const std::vector<LayerStatistics> seen = Observe(down_hadamard, &after);
    EXPECT_LT(LargestDifference(before_, after), 1e-4);
    for (size_t layer = 0; layer < seen.size(); ++layer) {
      for (size_t c = 0; c < seen[layer].key_max.size(); ++c) {
        ASSERT_NEAR(statistics_[layer].key_max[c], seen[layer].key_max[c], 1e-4);
      }
      for (size_t i = 0; i < kLayerInputs; ++i) {
        const InputStatistics &mine = statistics_[layer].inputs[i], &theirs = seen[layer].inputs[i];
        ASSERT_EQ(mine.samples.size(), theirs.samples.size());
        for (size_t j = 0; j < mine.samples.size(); ++j)
          ASSERT_NEAR(mine.samples[j], theirs.samples[j], 1e-4) << "layer " << layer << " input " << i;
        for (size_t c = 0; c < mine.mean_square.size(); ++c)
          ASSERT_NEAR(mine.mean_square[c], theirs.mean_square[c], 1e-4) << "layer " << layer << " input " << i;
      }
    }
  }

  void RotateEverything(const Rotation& rotation) {
    const size_t h = static_cast<size_t>(model_.config.hidden_size);
    for (Vector& row : model_.embedding) {
      std::vector<float> x(row.begin(), row.end());
      rotation.ApplyToRows(x, &pool_);
      row.assign(x.begin(), x.end());
    }
    for (size_t i = 0; i < model_.head.size(); ++i) model_.head[i] *= static_cast<float>(model_.final_norm[i % h]);
    model_.final_norm.assign(h, 1.0);
    rotation.ApplyToRows(model_.head, &pool_);
    for (DenseLayer& layer : model_.layers) {
      FoldNorms(&layer);
      RotateResidual(rotation, &layer, &pool_);
    }
  }

  ThreadPool pool_{2};
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
    SmoothAttention(model_.config, 0.6, &statistics_[i], &model_.layers[i]);
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

TEST_F(TransformTest, FoldedNormsKeepTheFunction) {
  EXPECT_NE(model_.layers[0].input_norm[0], 1.0f);
  for (DenseLayer& layer : model_.layers) FoldNorms(&layer);
  EXPECT_EQ(model_.layers[0].input_norm[0], 1.0f);
  EXPECT_LT(LargestDifference(before_, Logits(model_, tokens_, unchanged_)), 1e-4);
}

TEST_F(TransformTest, RotationsOfTheResidualKeepTheFunction) {
  const int64_t h = model_.config.hidden_size;
  const FloatModel original = model_;
  std::vector<float> moments(static_cast<size_t>(h * h), 0.0f);
  std::mt19937 random(3);
  for (int64_t i = 0; i < h; ++i) moments[static_cast<size_t>(i * h + i)] = static_cast<float>(random() % 1000);
  for (const Rotation& rotation :
       {Rotation::Hadamard(h, 5), Rotation::Principal(PrincipalBasis(moments, h, 128, 7, &pool_), h, 128, 5)}) {
    model_ = original;
    RotateEverything(rotation);
    EXPECT_LT(LargestDifference(before_, Logits(model_, tokens_, unchanged_)), 1e-4);
    // Another stream runs through it.
    EXPECT_GT(std::fabs(model_.embedding[3][0] - original.embedding[3][0]), 1e-4);
  }
}

TEST_F(TransformTest, RotatedHeadsKeepTheFunction) {
  for (size_t i = 0; i < model_.layers.size(); ++i) RotateHeads(model_.config, &statistics_[i], &model_.layers[i]);
  ExpectFunctionAndStatisticsKept(/*down_hadamard=*/0);
}

TEST_F(TransformTest, SmoothedOutputsKeepTheFunction) {
  const std::vector<float> before = ChannelMax(statistics_[0].input(LayerInput::kDown).samples, 512);
  for (size_t i = 0; i < model_.layers.size(); ++i)
    SmoothOutputs(model_.config, 0.5, /*heads_rotated=*/false, /*down_rotated=*/i == 1, &statistics_[i],
                  &model_.layers[i]);
  ExpectFunctionAndStatisticsKept(/*down_hadamard=*/0);
  EXPECT_NE(ChannelMax(statistics_[0].input(LayerInput::kDown).samples, 512), before);
}

TEST_F(TransformTest, SortedNeuronsKeepTheFunction) {
  for (size_t i = 0; i < model_.layers.size(); ++i) SortNeurons(2, 128, &statistics_[i], &model_.layers[i]);
  ExpectFunctionAndStatisticsKept(/*down_hadamard=*/0);
  // Segments [0, 256) and [256, 512) hold units 0 and 2, 1 and 3 of the falling order.
  std::vector<float> contribution = ColumnEnergy(model_.layers[0], LayerInput::kDown);
  for (size_t c = 0; c < contribution.size(); ++c)
    contribution[c] *= statistics_[0].input(LayerInput::kDown).mean_square[c];
  for (const auto& [larger, smaller] : {std::pair{127, 256}, {383, 128}, {255, 384}})
    EXPECT_GE(contribution[static_cast<size_t>(larger)], contribution[static_cast<size_t>(smaller)]);
}

TEST_F(TransformTest, OnlineHadamardKeepsTheFunction) {
  EXPECT_EQ(DownHadamardSize(model_.config), 256);  // 512 channels, two ranks
  for (size_t i = 0; i < model_.layers.size(); ++i) RotateDown(64, &statistics_[i], &model_.layers[i]);
  EXPECT_GT(LargestDifference(before_, Logits(model_, tokens_, unchanged_)), 1e-2);  // weights alone are not enough
  ExpectFunctionAndStatisticsKept(/*down_hadamard=*/64);
}

TEST_F(TransformTest, AllTransformsTogetherKeepTheFunction) {
  RotateEverything(Rotation::Hadamard(model_.config.hidden_size, 11));
  statistics_ = Observe(0);
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    SmoothAttention(model_.config, 0.6, &statistics_[i], &model_.layers[i]);
    SmoothOutputs(model_.config, 0.5, true, true, &statistics_[i], &model_.layers[i]);
    RotateHeads(model_.config, &statistics_[i], &model_.layers[i]);
    SortNeurons(2, 256, &statistics_[i], &model_.layers[i]);
    RotateDown(256, &statistics_[i], &model_.layers[i]);
  }
  ExpectFunctionAndStatisticsKept(/*down_hadamard=*/256);
}

TEST(RotationTest, IsOrthogonalForAnySize) {
  ThreadPool pool(2);
  for (const int64_t k : {64, 96, 5 * 64, 7 * 32, 1}) {
    const Rotation rotation = Rotation::Hadamard(k, 3);
    std::vector<float> matrix(static_cast<size_t>(k * k), 0.0f);  // rows of the identity become rows of R
    for (int64_t i = 0; i < k; ++i) matrix[static_cast<size_t>(i * k + i)] = 1;
    rotation.ApplyToRows(matrix, &pool);
    for (int64_t a = 0; a < k; ++a) {
      for (int64_t b = 0; b <= a; ++b) {
        double dot = 0;
        for (int64_t c = 0; c < k; ++c)
          dot += static_cast<double>(matrix[static_cast<size_t>(a * k + c)] * matrix[static_cast<size_t>(b * k + c)]);
        ASSERT_NEAR(dot, a == b ? 1.0 : 0.0, 1e-5) << k << ": rows " << a << " and " << b;
      }
    }
    // No entry stands out: every channel of the stream goes into every channel of the rotated one.
    for (const float x : matrix) ASSERT_LE(std::fabs(x), 1.42 / std::sqrt(static_cast<double>(k)));
    // Columns are rotated by the transpose: Rᵀ·R = 1.
    rotation.ApplyToColumns(matrix, k, &pool);
    for (int64_t i = 0; i < k * k; ++i)
      ASSERT_NEAR(matrix[static_cast<size_t>(i)], i / k == i % k ? 1.0 : 0.0, 1e-5) << k;
  }
}

TEST(RotationTest, PrincipalBasisFindsTheLargestDirections) {
  // Moments Σ_i e_i·v_i·v_iᵀ with known orthonormal v: the rows of a Hadamard rotation.
  constexpr int64_t kSize = 128, kLeading = 16;
  ThreadPool pool(2);
  std::vector<float> directions(kSize * kSize, 0.0f);
  for (int64_t i = 0; i < kSize; ++i) directions[static_cast<size_t>(i * kSize + i)] = 1;
  Rotation::Hadamard(kSize, 9).ApplyToRows(directions, &pool);
  std::vector<float> moments(kSize * kSize, 0.0f);
  for (int64_t i = 0; i < kSize; ++i) {
    const float energy = i < kLeading ? 10.0f : 1.0f;
    for (int64_t a = 0; a < kSize; ++a) {
      for (int64_t b = 0; b < kSize; ++b) {
        moments[static_cast<size_t>(a * kSize + b)] +=
            energy * directions[static_cast<size_t>(i * kSize + a)] * directions[static_cast<size_t>(i * kSize + b)];
      }
    }
  }
  const std::vector<float> basis = PrincipalBasis(moments, kSize, kLeading, 1, &pool);
  double captured = 0;  // of the leading directions' squared length, 16 in all
  for (int64_t i = 0; i < kLeading; ++i) {
    for (int64_t column = 0; column < kLeading; ++column) {
      double dot = 0;
      for (int64_t a = 0; a < kSize; ++a) {
        dot += static_cast<double>(directions[static_cast<size_t>(i * kSize + a)] *
                                   basis[static_cast<size_t>(a * kSize + column)]);
      }
      captured += dot * dot;
    }
  }
  EXPECT_NEAR(captured, kLeading, 1e-3);
}

TEST_F(TransformTest, PermutationsKeepTheFunction) {
  std::vector<std::vector<InputPlan>> plans(model_.layers.size(), std::vector<InputPlan>(kLayerInputs));
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    for (size_t j = 0; j < kLayerInputs; ++j) {
      const LayerInput which = static_cast<LayerInput>(j);
      const bool rows = which == LayerInput::kO || which == LayerInput::kDown;
      plans[i][j].perm = SortChannels(ColumnEnergy(model_.layers[i], which), rows ? RowSegments(model_.config) : 1);
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
