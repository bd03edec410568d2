#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "tools/quantize/gptq.h"
#include "tools/quantize/rounding_order.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Raw draws only: the standard's distributions differ between libraries.
class Draws {
 public:
  explicit Draws(uint64_t seed) : random_(seed) {}
  float Uniform() { return static_cast<float>(random_() >> 40) * 0x1p-24f * 2 - 1; }
  float Bell() { return (Uniform() + Uniform() + Uniform() + Uniform()) / 2; }

 private:
  std::mt19937_64 random_;
};

// Tokens whose channels share a few directions, a channel in fifty ten times as large.
std::vector<float> CorrelatedRows(int64_t rows, int64_t k, uint64_t seed) {
  Draws draws(seed);
  constexpr int64_t kDirections = 24;
  std::vector<float> mix(static_cast<size_t>(kDirections * k));
  for (float& m : mix) m = draws.Bell();
  std::vector<float> x;
  for (int64_t t = 0; t < rows; ++t) {
    float strength[kDirections];
    for (float& s : strength) s = draws.Bell();
    for (int64_t c = 0; c < k; ++c) {
      float value = 0.3f * draws.Bell();
      for (int64_t d = 0; d < kDirections; ++d) value += strength[d] * mix[static_cast<size_t>(d * k + c)];
      x.push_back(c % 50 == 7 ? 10 * value : value);
    }
  }
  return x;
}

DenseLinear Linear(int64_t n, int64_t k, uint64_t seed) {
  Draws draws(seed);
  DenseLinear linear;
  linear.shape.name = "l";
  linear.shape.n = n;
  linear.shape.k = k;
  for (int64_t i = 0; i < n * k; ++i) linear.weight.push_back(draws.Bell());
  return linear;
}

InputPlan Plan(int64_t k, bool permuted) {
  InputPlan plan{.block_bits = std::vector<uint8_t>(static_cast<size_t>(k / 128), 4), .perm = {}};
  if (permuted) {
    for (int64_t i = 0; i < k; ++i) plan.perm.push_back(static_cast<int32_t>((i * 37 + 11) % k));
  }
  return plan;
}

void ExpectOnGrid(const LinearTensors& tensors) {
  for (size_t g = 0; g < tensors.group_scale.size(); ++g) {
    ASSERT_GE(tensors.group_scale[g], 1);
    ASSERT_LE(tensors.group_scale[g], 16);
    ASSERT_GE(tensors.group_min[g], -119);
    ASSERT_LE(tensors.group_min[g], 119);
    ASSERT_LE(tensors.group_min[g] + 15 * tensors.group_scale[g], 127);
  }
  for (const float s : tensors.channel_scale) {
    ASSERT_TRUE(std::isfinite(s));
    ASSERT_GE(s, 0);
  }
}

class GptqTest : public ::testing::Test {
 protected:
  static constexpr int64_t kN = 40, kK = 384;

  std::unique_ptr<RoundingDevice> Device(int threads) { return *CreateRoundingDevice({.threads = threads}); }

  RoundedLinear Round(const GptqOptions& options, bool permuted = false, int threads = 2) {
    const auto device = Device(threads);
    const InputPlan plan = Plan(kK, permuted);
    const auto moments = *device->CreateMoments(kK, false);
    EXPECT_TRUE(device->Accumulate(x_, moments.get()).ok());
    hessian_ = *moments->Hessian();
    const auto factor = *device->Factorize(*moments, plan, options);
    return *device->Round(linear_, plan, *moments, *factor, options);
  }
  double Error(const RoundedLinear& rounded) { return OutputError(linear_.weight, rounded.tensors, hessian_); }

  const std::vector<float> x_ = CorrelatedRows(700, kK, 1);
  const DenseLinear linear_ = Linear(kN, kK, 2);
  std::vector<float> hessian_;
};

TEST_F(GptqTest, HasFarLessOutputErrorThanRoundingToNearest) {
  const double nearest = Error(Round({.compensate = false}));
  for (const RoundingOrder order :
       {RoundingOrder::kStored, RoundingOrder::kWithinGroup, RoundingOrder::kByGroup, RoundingOrder::kAll}) {
    for (const bool permuted : {false, true}) {
      const RoundedLinear rounded = Round({.order = order}, permuted);
      ASSERT_NO_FATAL_FAILURE(ExpectOnGrid(rounded.tensors));
      EXPECT_EQ(rounded.report.fallback, "");
      EXPECT_LT(Error(rounded), 0.35 * nearest) << static_cast<int>(order);
    }
  }
}

TEST_F(GptqTest, ReportsTheErrorThatTheCodesHave) {
  for (const bool compensate : {false, true}) {
    for (const int refinements : {0, 2}) {
      const RoundedLinear rounded = Round({.compensate = compensate, .refinements = refinements}, true);
      EXPECT_NEAR(rounded.report.output_error / Error(rounded), 1, 1e-3);
      EXPECT_GT(rounded.report.relative_error(), 0);
      EXPECT_LT(rounded.report.relative_error(), 0.05);
    }
  }
}

// The sweep written down plainly in f64, from gptq.h: the tiles, panels and blocks must not change what it computes.
TEST_F(GptqTest, FollowsTheDefinition) {
  const GptqOptions options{.order = RoundingOrder::kStored, .row_clips = {1.0f}};
  const RoundedLinear rounded = Round(options);
  const std::vector<float> coded = DequantizeLinear(rounded.tensors);
  double mean = 0;
  for (size_t i = 0; i < kK; ++i) mean += static_cast<double>(hessian_[i * kK + i]) / kK;
  std::vector<double> m(kK * kK, 0.0);
  for (size_t c = kK; c-- > 0;) {
    for (size_t r = c + 1; r-- > 0;) {
      double sum = static_cast<double>(hessian_[r * kK + c]) + (r == c ? options.damping * mean : 0.0);
      for (size_t d = c + 1; d < kK; ++d) sum -= m[r * kK + d] * m[c * kK + d];
      m[r * kK + c] = r == c ? std::sqrt(sum) : sum / m[c * kK + c];
    }
  }
  int64_t off = 0;
  for (size_t n = 0; n < kN; ++n) {
    std::vector<double> d(kK);
    for (size_t j = 0; j < kK; ++j) {
      double target = static_cast<double>(linear_.weight[n * kK + j]);
      for (size_t i = 0; i < j; ++i) target += d[i] * m[i * kK + j] / m[j * kK + j];
      const size_t g = n * (kK / 128) + j / 128;
      const double step = static_cast<double>(rounded.tensors.channel_scale[n]);
      const double scale = rounded.tensors.group_scale[g], min = rounded.tensors.group_min[g];
      const double code = std::clamp(std::nearbyint((target / step - min) / scale), 0.0, 15.0);
      const double got = static_cast<double>(coded[n * kK + j]);
      off += std::fabs(got - step * (code * scale + min)) > 1e-3 * step;
      d[j] = static_cast<double>(linear_.weight[n * kK + j]) - got;  // follows what was coded: one tie is one, not many
    }
  }
  EXPECT_LE(off, kN * kK / 1000);  // f32 sums decide a tie another way now and then
}

TEST_F(GptqTest, DoesNotDependOnThreads) {
  const RoundedLinear one = Round({.refinements = 1}, true, 1), three = Round({.refinements = 1}, true, 3);
  EXPECT_EQ(one.tensors.qweight, three.tensors.qweight);
  EXPECT_EQ(one.tensors.group_scale, three.tensors.group_scale);
  EXPECT_EQ(one.tensors.group_min, three.tensors.group_min);
  EXPECT_EQ(one.tensors.channel_scale, three.tensors.channel_scale);
}

TEST_F(GptqTest, SearchesHelp) {
  const double none = Error(Round({.row_clips = {1.0f}, .search_groups = false}));
  const double groups = Error(Round({.row_clips = {1.0f}}));
  const double rows = Error(Round({}));
  const double refined = Error(Round({.refinements = 2}));
  EXPECT_LT(groups, none);
  EXPECT_LT(rows, groups);
  EXPECT_LT(refined, rows);
}

TEST_F(GptqTest, FallsBackWhereTheHessianSaysNothing) {
  const auto device = Device(1);
  const InputPlan plan = Plan(kK, false);
  const auto moments = *device->CreateMoments(kK, false);  // nothing accumulated: zero
  const auto factor = *device->Factorize(*moments, plan, {});
  const RoundedLinear rounded = *device->Round(linear_, plan, *moments, *factor, {});
  EXPECT_THAT(rounded.report.fallback, HasSubstr("not positive definite"));
  EXPECT_EQ(rounded.report.dead_columns, kK);
  ASSERT_NO_FATAL_FAILURE(ExpectOnGrid(rounded.tensors));
  const std::vector<float> coded = DequantizeLinear(rounded.tensors);
  for (size_t i = 0; i < coded.size(); ++i) ASSERT_NEAR(coded[i], linear_.weight[i], 0.2f);

  const std::vector<float> broken(static_cast<size_t>(kK), std::numeric_limits<float>::infinity());
  ASSERT_TRUE(device->Accumulate(broken, moments.get()).ok());
  const auto infinite = *device->Factorize(*moments, plan, {});
  EXPECT_NE(device->Round(linear_, plan, *moments, *infinite, {})->report.fallback, "");
}

// Fewer tokens than channels: singular, made definite by damping alone.
TEST_F(GptqTest, DampsWhatHasTooFewTokens) {
  const auto device = Device(1);
  const InputPlan plan = Plan(kK, false);
  const auto moments = *device->CreateMoments(kK, false);
  std::vector<float> x = CorrelatedRows(64, kK, 5);
  for (size_t i = 0; i < x.size(); i += 3) x[i] = i % static_cast<size_t>(kK) == 3 ? 0 : x[i];
  for (size_t t = 0; t < 64; ++t) x[t * kK + 3] = 0;  // a dead channel
  ASSERT_TRUE(device->Accumulate(x, moments.get()).ok());
  const auto factor = *device->Factorize(*moments, plan, {});
  const RoundedLinear rounded = *device->Round(linear_, plan, *moments, *factor, {});
  EXPECT_EQ(rounded.report.fallback, "");
  EXPECT_EQ(rounded.report.dead_columns, 1);
  const GptqOptions plain{.compensate = false};
  const auto no_factor = *device->Factorize(*moments, plan, plain);
  const RoundedLinear nearest = *device->Round(linear_, plan, *moments, *no_factor, plain);
  EXPECT_LT(rounded.report.output_error, 0.3 * nearest.report.output_error);
}

// With the coded input known, the weights make up for what coding lost.
TEST_F(GptqTest, CompensatesCodingErrors) {
  std::vector<float> coded = x_;
  for (float& x : coded) x = std::nearbyint(x * 1.5f) / 1.5f;
  for (size_t t = 0; t < coded.size(); t += kK) coded[t + 9] = 0;  // a channel that coding loses
  const auto device = Device(2);
  const InputPlan plan = Plan(kK, true);
  const auto error = [&](bool aware) {
    const auto moments = *device->CreateMoments(kK, aware);
    EXPECT_TRUE((aware ? device->Accumulate(x_, coded, moments.get()) : device->Accumulate(coded, moments.get())).ok());
    const auto factor = *device->Factorize(*moments, plan, {});
    const std::vector<float> w = DequantizeLinear(device->Round(linear_, plan, *moments, *factor, {})->tensors);
    double sum = 0;
    for (size_t t = 0; t < x_.size(); t += kK) {
      for (size_t n = 0; n < kN; ++n) {
        double y = 0;
        for (size_t i = 0; i < kK; ++i) {
          y += static_cast<double>(x_[t + i]) * static_cast<double>(linear_.weight[n * kK + i]) -
               static_cast<double>(coded[t + i]) * static_cast<double>(w[n * kK + i]);
        }
        sum += y * y;
      }
    }
    return sum;
  };
  EXPECT_LT(error(true), 0.8 * error(false));
}

TEST(OrderColumns, KeepsGroupsTogether) {
  std::vector<float> energy(256, 1.0f);
  energy[200] = 9, energy[130] = 5, energy[3] = 4;
  const InputPlan plan = Plan(256, false);
  const auto first = [&](RoundingOrder order) {
    const ColumnOrder columns = OrderColumns(energy, plan, order);
    EXPECT_EQ(columns.groups_in_turn, order != RoundingOrder::kAll);
    return std::vector<int32_t>(columns.code.begin(), columns.code.begin() + 3);
  };
  EXPECT_THAT(first(RoundingOrder::kStored), ElementsAre(0, 1, 2));
  EXPECT_THAT(first(RoundingOrder::kWithinGroup), ElementsAre(3, 0, 1));
  EXPECT_THAT(first(RoundingOrder::kByGroup), ElementsAre(200, 130, 128));
  EXPECT_THAT(first(RoundingOrder::kAll), ElementsAre(200, 130, 3));
}

TEST(CreateRoundingDevice, RefusesWhatItCannotMake) {
  EXPECT_TRUE(absl::IsInvalidArgument(CreateRoundingDevice({.device = "tpu"}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(CreateRoundingDevice({.threads = 0}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument((*CreateRoundingDevice({}))->CreateMoments(100, false).status()));
}

}  // namespace
}  // namespace nibble
