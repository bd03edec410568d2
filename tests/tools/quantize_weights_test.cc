#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tools/quantize/weight_quantizer.h"

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

 private:
  std::mt19937_64 random_;
};

double WeightedError(std::span<const float> weight, std::span<const float> importance, const std::vector<float>& got) {
  double error = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    error += static_cast<double>((got[i] - weight[i]) * (got[i] - weight[i]) * importance[i]);
  }
  return error;
}

// docs/numerics.md's definition without any search.
std::vector<float> RoundToNearest(std::span<const float> weight) {
  float largest = 0;
  for (const float w : weight) largest = std::max(largest, std::fabs(w));
  const float scale = largest / 119;
  std::vector<float> out;
  for (size_t g = 0; g < weight.size(); g += 128) {
    float low = 119, high = -119;
    std::vector<float> q8;
    for (size_t i = g; i < g + 128; ++i) {
      q8.push_back(std::nearbyint(weight[i] / scale));
      low = std::min(low, q8.back());
      high = std::max(high, q8.back());
    }
    const float s2 = std::max(1.0f, std::nearbyint((high - low) / 15));
    for (const float q : q8)
      out.push_back(scale * (std::clamp(std::nearbyint((q - low) / s2), 0.0f, 15.0f) * s2 + low));
  }
  return out;
}

void ExpectInRange(const QuantizedRow& row) {
  for (const uint8_t code : row.codes) ASSERT_LE(code, 15);
  for (size_t g = 0; g < row.group_scale.size(); ++g) {
    ASSERT_GE(row.group_scale[g], 1);
    ASSERT_LE(row.group_scale[g], 16);
    ASSERT_GE(row.group_min[g], -119);
    ASSERT_LE(row.group_min[g], 119);
    ASSERT_LE(row.group_min[g] + 15 * row.group_scale[g], 127);
  }
  ASSERT_TRUE(std::isfinite(row.channel_scale));
  ASSERT_GE(row.channel_scale, 0);
}

// Any finite row: values of the format in range, and each weight within the error its group's step allows.
TEST(QuantizeRow, StaysInTheFormatForEveryRow) {
  Draws draws(7);
  for (int round = 0; round < 300; ++round) {
    const size_t k = 128 * (1 + draws.Below(3));
    std::vector<float> weight(k), importance(k);
    const float size = std::pow(10.0f, draws.Uniform() * 8);
    for (float& w : weight) {
      w = size * (round % 3 == 0 ? draws.Uniform() : draws.Bell());
      if (draws.Below(50) == 0) w *= 20;
      if (round % 5 == 0) w = std::fabs(w);  // one-sided groups use min, not just scale
      if (round % 7 == 0 && draws.Below(3) == 0) w = 0;
    }
    for (float& x : importance) x = std::exp(4 * draws.Uniform());
    const QuantizedRow row = QuantizeRow(weight, importance);
    ASSERT_NO_FATAL_FAILURE(ExpectInRange(row)) << round;
  }
}

TEST(QuantizeRow, IsNeverWorseThanRoundingToNearest) {
  Draws draws(8);
  double searched = 0, nearest = 0;
  for (int round = 0; round < 200; ++round) {
    std::vector<float> weight(256), importance(256);
    for (float& w : weight) w = draws.Bell() * (draws.Below(100) == 0 ? 4.0f : 1.0f);
    for (float& x : importance) x = std::exp(2 * draws.Uniform());
    const double mine = WeightedError(weight, importance, DequantizeRow(QuantizeRow(weight, importance)));
    const double theirs = WeightedError(weight, importance, RoundToNearest(weight));
    EXPECT_LE(mine, theirs * 1.02) << round;  // levels are rounded once here, twice there
    searched += mine;
    nearest += theirs;
  }
  EXPECT_LT(searched, 0.9 * nearest);
}

TEST(QuantizeRow, SpendsPrecisionWhereItMatters) {
  Draws draws(9);
  std::vector<float> weight(128), flat(128, 1.0f), spiked(128, 1.0f);
  for (float& w : weight) w = draws.Bell() * 0.3f;
  weight[5] = 3;      // an outlier
  spiked[5] = 1e-6f;  // that nobody reads
  const std::vector<float> a = DequantizeRow(QuantizeRow(weight, flat)), b = DequantizeRow(QuantizeRow(weight, spiked));
  EXPECT_LT(WeightedError(weight, spiked, b), 0.8 * WeightedError(weight, spiked, a));
}

TEST(QuantizeRow, ZerosStayZero) {
  for (const float value : {0.0f, 1e-38f, -1e-40f}) {
    const QuantizedRow row = QuantizeRow(std::vector<float>(128, value), std::vector<float>(128, 1.0f));
    ExpectInRange(row);
    EXPECT_THAT(DequantizeRow(row), Each(0.0f));
  }
  // Without any importance (a channel that was never active) the weights still come out near.
  std::vector<float> weight(128, 0.5f);
  weight[0] = -0.5f;
  const std::vector<float> got = DequantizeRow(QuantizeRow(weight, std::vector<float>(128, 0.0f)));
  for (size_t i = 0; i < 128; ++i) EXPECT_NEAR(got[i], weight[i], 0.05f);
}

TEST(QuantizeLinear, PermutesIntoCodeOrderAndPacks) {
  Draws draws(10);
  DenseLinear linear;
  linear.shape.n = 6;
  linear.shape.k = 256;
  linear.weight.resize(6 * 256);
  linear.bias = {1, 2, 3, 4, 5, 6};
  for (float& w : linear.weight) w = draws.Bell();
  InputPlan plan{.block_bits = {8, 4}, .perm = std::vector<int32_t>(256)};
  for (int32_t i = 0; i < 256; ++i) plan.perm[static_cast<size_t>(i)] = 255 - i;
  std::vector<float> mean_square(256);
  for (float& x : mean_square) x = std::exp(draws.Uniform());
  ThreadPool pool(2);
  const LinearTensors got = QuantizeLinear(linear, plan, mean_square, &pool);
  EXPECT_EQ(got.n, 6);
  EXPECT_EQ(got.k, 256);
  EXPECT_EQ(got.bias, linear.bias);
  EXPECT_EQ(got.input_perm, plan.perm);
  EXPECT_EQ(got.block_bits, plan.block_bits);
  for (size_t n = 0; n < 6; ++n) {
    std::vector<float> row(256), importance(256);
    for (size_t i = 0; i < 256; ++i) row[i] = linear.weight[n * 256 + 255 - i], importance[i] = mean_square[255 - i];
    const QuantizedRow want = QuantizeRow(row, importance);
    EXPECT_EQ(got.channel_scale[n], want.channel_scale);
    for (size_t i = 0; i < 256; ++i) {
      const uint8_t byte = got.qweight[(n * 256 + i) / 2];
      EXPECT_EQ(i % 2 == 0 ? byte & 15 : byte >> 4, want.codes[i]) << n << " " << i;
    }
    for (size_t g = 0; g < 2; ++g) {
      EXPECT_EQ(got.group_scale[n * 2 + g], want.group_scale[g]);
      EXPECT_EQ(got.group_min[n * 2 + g], want.group_min[g]);
    }
  }
}

}  // namespace
}  // namespace nibble
