// Rounding to nearest on the searched grid, and what holds of every row whatever rounded it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "tools/quantize/gptq.h"
#include "tools/quantize/tile_kernels.h"

namespace nibble {
namespace {

using ::testing::Each;

// Raw draws only: the standard's distributions differ between libraries.
class Draws {
 public:
  explicit Draws(uint64_t seed) : random_(seed) {}
  float Uniform() { return static_cast<float>(random_() >> 40) * 0x1p-24f * 2 - 1; }
  float Bell() { return (Uniform() + Uniform() + Uniform() + Uniform()) / 2; }
  uint64_t Below(uint64_t n) { return random_() % n; }
  std::vector<float> Bells(int64_t count) {
    std::vector<float> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(Bell());
    return out;
  }

 private:
  std::mt19937_64 random_;
};

double WeightedError(std::span<const float> weight, std::span<const float> importance, const std::vector<float>& got) {
  double error = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    const size_t k = i % importance.size();
    error += static_cast<double>((got[i] - weight[i]) * (got[i] - weight[i]) * importance[k]);
  }
  return error;
}

// Rows of weight [N, K] rounded to nearest, the squared error of column k weighing importance[k].
LinearTensors RoundToNearest(const std::vector<float>& weight, const std::vector<float>& importance,
                             bool search = true) {
  const int64_t k = static_cast<int64_t>(importance.size());
  const std::unique_ptr<RoundingDevice> device = CreateCpuRoundingDevice(1);
  const std::unique_ptr<InputMoments> moments = *device->CreateMoments(k, false);
  std::vector<float> x(importance.size() * importance.size());  // one token for each channel: H is diagonal
  for (size_t i = 0; i < importance.size(); ++i) x[i * importance.size() + i] = std::sqrt(importance[i]);
  EXPECT_TRUE(device->Accumulate(x, moments.get()).ok());
  const InputPlan plan{.block_bits = std::vector<uint8_t>(static_cast<size_t>(k / 128), 8), .perm = {}};
  GptqOptions options{.compensate = false, .order = RoundingOrder::kStored, .search_groups = search};
  if (!search) options.row_clips = {1.0f};
  DenseLinear linear;
  linear.shape.n = static_cast<int64_t>(weight.size()) / k;
  linear.shape.k = k;
  linear.weight = weight;
  const auto factor = *device->Factorize(*moments, plan, options);
  return device->Round(linear, plan, *moments, *factor, options)->tensors;
}

void ExpectInRange(const LinearTensors& tensors) {
  for (size_t g = 0; g < tensors.group_scale.size(); ++g) {
    ASSERT_GE(tensors.group_scale[g], 1);
    ASSERT_LE(tensors.group_scale[g], 16);
    ASSERT_GE(tensors.group_min[g], -119);
    ASSERT_LE(tensors.group_min[g], 119);
    ASSERT_LE(tensors.group_min[g] + 15 * tensors.group_scale[g], 127);
  }
  for (const float scale : tensors.channel_scale) {
    ASSERT_TRUE(std::isfinite(scale));
    ASSERT_GE(scale, 0);
  }
}

TEST(RoundToNearest, StaysInTheFormatForEveryRow) {
  Draws draws(7);
  for (int round = 0; round < 30; ++round) {
    const int64_t k = 128 * static_cast<int64_t>(1 + draws.Below(3));
    std::vector<float> weight, importance;
    for (int row = 0; row < 20; ++row) {
      const float size = std::pow(10.0f, draws.Uniform() * 8);
      for (int64_t i = 0; i < k; ++i) {
        float w = size * (row % 3 == 0 ? draws.Uniform() : draws.Bell());
        if (draws.Below(50) == 0) w *= 20;
        if (row % 5 == 0) w = std::fabs(w);  // one-sided groups use min, not just scale
        if (row % 7 == 0 && draws.Below(3) == 0) w = 0;
        weight.push_back(w);
      }
    }
    for (int64_t i = 0; i < k; ++i) importance.push_back(std::exp(4 * draws.Uniform()));
    ASSERT_NO_FATAL_FAILURE(ExpectInRange(RoundToNearest(weight, importance))) << round;
  }
}

// docs/numerics.md's definition.
TEST(RoundToNearest, WithoutSearchIsTheDefinition) {
  Draws draws(8);
  const std::vector<float> weight = draws.Bells(30 * 256);
  const std::vector<float> got = DequantizeLinear(RoundToNearest(weight, std::vector<float>(256, 1.0f), false));
  int64_t off = 0;
  for (size_t row = 0; row < weight.size(); row += 256) {
    float largest = 0;
    for (size_t i = row; i < row + 256; ++i) largest = std::max(largest, std::fabs(weight[i]));
    const float step = largest * (1.0f / 119);
    for (size_t g = row; g < row + 256; g += 128) {
      float low = 119, high = -119;
      for (size_t i = g; i < g + 128; ++i) {
        low = std::min(low, std::nearbyint(weight[i] / step));
        high = std::max(high, std::nearbyint(weight[i] / step));
      }
      const float s2 = std::max(1.0f, std::nearbyint((high - low) / 15));
      for (size_t i = g; i < g + 128; ++i) {
        // The level is rounded once, to the code; rounding it to Q8 first, as the format is defined, costs half a
        // level.
        const float code = std::clamp(std::nearbyint((weight[i] / step - low) / s2), 0.0f, 15.0f);
        off += std::fabs(got[i] - step * (code * s2 + low)) > 1e-4f * step;
      }
    }
  }
  EXPECT_LE(off, 2);  // 1/step in f32 decides a tie another way
}

TEST(RoundToNearest, SearchPays) {
  Draws draws(9);
  std::vector<float> weight = draws.Bells(100 * 256), importance;
  for (float& w : weight) w *= draws.Below(100) == 0 ? 4.0f : 1.0f;
  for (int i = 0; i < 256; ++i) importance.push_back(std::exp(2 * draws.Uniform()));
  const double searched = WeightedError(weight, importance, DequantizeLinear(RoundToNearest(weight, importance)));
  const double plain = WeightedError(weight, importance, DequantizeLinear(RoundToNearest(weight, importance, false)));
  EXPECT_LT(searched, 0.9 * plain);
}

TEST(RoundToNearest, SpendsPrecisionWhereItMatters) {
  Draws draws(9);
  std::vector<float> weight(128), flat(128, 1.0f), spiked(128, 1.0f);
  for (float& w : weight) w = draws.Bell() * 0.3f;
  weight[5] = 3;      // an outlier
  spiked[5] = 1e-6f;  // that nobody reads
  const std::vector<float> a = DequantizeLinear(RoundToNearest(weight, flat)),
                           b = DequantizeLinear(RoundToNearest(weight, spiked));
  EXPECT_LT(WeightedError(weight, spiked, b), 0.8 * WeightedError(weight, spiked, a));
}

TEST(RoundToNearest, ZerosStayZero) {
  for (const float value : {0.0f, 1e-38f, -1e-40f}) {
    const LinearTensors tensors = RoundToNearest(std::vector<float>(128, value), std::vector<float>(128, 1.0f));
    ExpectInRange(tensors);
    EXPECT_THAT(DequantizeLinear(tensors), Each(0.0f));
  }
  // Without any importance (channels that were never active) the weights still come out near.
  std::vector<float> weight(128, 0.5f);
  weight[0] = -0.5f;
  const std::vector<float> got = DequantizeLinear(RoundToNearest(weight, std::vector<float>(128, 0.0f)));
  for (size_t i = 0; i < 128; ++i) EXPECT_NEAR(got[i], weight[i], 0.05f);
}

TEST(TileKernels, AgreeBetweenInstructionSets) {
  constexpr int64_t kK = 256;
  Draws draws(11);
  const std::vector<float> weight = draws.Bells(kK * kPanel), factor = draws.Bells(kK * kK), column_weight(kK, 1.0f);
  std::vector<float> feedback = factor, hessian = factor;
  for (float& x : feedback) x *= 0.05f;
  for (int64_t i = 0; i < kK; ++i)
    hessian[static_cast<size_t>(i / kPanel * kK * kPanel + i * kPanel + i % kPanel)] = 50;
  std::vector<int32_t> group_of;
  for (int32_t i = 0; i < kK; ++i) group_of.push_back(i / 128);
  const float clips[] = {1.0f, 0.9f};
  struct Output {
    std::vector<uint8_t> codes = std::vector<uint8_t>(kK * kPanel);
    std::vector<float> floats = std::vector<float>(kK * kPanel + 2 * 2 * kPanel + kPanel);
  };
  const auto round = [&](const TileKernels& kernels) {
    Output out;
    std::vector<float> scratch(static_cast<size_t>(TileScratchFloats(kK)));
    float* const rest = out.floats.data() + kK * kPanel;
    kernels.round({.k = kK,
                   .weight = weight.data(),
                   .group_of = group_of.data(),
                   .feedback = feedback.data(),
                   .column_weight = column_weight.data(),
                   .hessian = hessian.data(),
                   .clips = clips,
                   .num_clips = 2,
                   .refinements = 1},
                  scratch.data(),
                  {.codes = out.codes.data(),
                   .group_scale = rest,
                   .group_min = rest + 2 * kPanel,
                   .channel_scale = rest + 4 * kPanel,
                   .error = out.floats.data()});
    return out;
  };
  const Output best = round(BestTileKernels()), portable = round(PortableTileKernels());
  EXPECT_EQ(best.codes, portable.codes);
  EXPECT_EQ(best.floats, portable.floats);
}

}  // namespace
}  // namespace nibble
