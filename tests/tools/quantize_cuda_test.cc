// Rounding on a GPU against rounding on the CPU. Skipped where there is no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/base/float16.h"
#include "tools/quantize/gptq.h"

namespace nibble {
namespace {

constexpr int64_t kN = 200, kK = 1024, kTokens = 3000;  // N is no multiple of a tile

// The devices' sums have different orders. A target within that difference of the middle of two values is rounded the
// other way, and with it every later target of its row moves: so rows may differ, now and then, and errors hardly.
constexpr double kErrorBound = 0.02;
constexpr double kDifferentCodes = 0.02;

class CudaRoundingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto gpu = CreateRoundingDevice({.device = "cuda"});
    if (!gpu.ok()) GTEST_SKIP() << gpu.status().message();
    gpu_ = *std::move(gpu);

    // A few directions shared by all channels, noise, one channel in two hundred thirty times as large. bf16 values, so
    // that what the GPU rounds inputs to changes nothing.
    constexpr size_t kDirections = 8;
    std::vector<float> mix(kDirections * kK), strength(kDirections);
    for (float& m : mix) m = Bell();
    for (int64_t t = 0; t < kTokens; ++t) {
      for (float& s : strength) s = 0.5f * Bell();
      for (size_t c = 0; c < kK; ++c) {
        float value = 0.7f * Bell();
        for (size_t d = 0; d < kDirections; ++d) value += strength[d] * mix[d * kK + c];
        x_.push_back(RoundToBF16(c % 200 == 17 ? 30 * value : value));
        coarse_.push_back(std::nearbyint(2 * x_.back()) / 2);
      }
    }
    linear_.shape.name = "l";
    linear_.shape.n = kN;
    linear_.shape.k = kK;
    for (int64_t i = 0; i < kN * kK; ++i) linear_.weight.push_back(0.02f * Bell());
    linear_.bias.assign(kN, 0.5f);
    for (size_t c = 0; c < kK; ++c) linear_.weight[7 * kK + c] = 0;  // a row of zeros
    for (int32_t c = 0; c < kK; ++c) plan_.perm.push_back((c * 5 + 3) % static_cast<int32_t>(kK));
  }

  float Bell() {
    float sum = -2;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(random_() >> 40) * 0x1p-24f;
    return sum * 1.7f;
  }

  struct Outcome {
    RoundedLinear rounded;
    std::vector<float> hessian;
  };
  Outcome Round(RoundingDevice* device, const GptqOptions& options, bool with_coding) {
    const auto moments = *device->CreateMoments(kK, with_coding);
    const absl::Status status =
        with_coding ? device->Accumulate(x_, coarse_, moments.get()) : device->Accumulate(x_, moments.get());
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(moments->rows(), kTokens);
    const auto factor = *device->Factorize(*moments, plan_, options);
    return {.rounded = *device->Round(linear_, plan_, *moments, *factor, options), .hessian = *moments->Hessian()};
  }

  void ExpectAgreement(const std::string& name, const GptqOptions& options, bool with_coding = false) {
    const Outcome cpu = Round(cpu_.get(), options, with_coding), gpu = Round(gpu_.get(), options, with_coding);
    const LinearTensors &want = cpu.rounded.tensors, &got = gpu.rounded.tensors;
    double largest = 0;
    for (size_t i = 0; i < cpu.hessian.size(); ++i) {
      largest = std::max(largest, std::fabs(static_cast<double>(cpu.hessian[i] - gpu.hessian[i])));
    }
    EXPECT_LT(largest, 1e-4 * static_cast<double>(cpu.hessian[0] + cpu.hessian[17 * kK + 17])) << name;
    EXPECT_EQ(gpu.rounded.report.fallback, cpu.rounded.report.fallback) << name;
    EXPECT_EQ(gpu.rounded.report.dead_columns, cpu.rounded.report.dead_columns) << name;
    EXPECT_EQ(got.bias, want.bias) << name;
    EXPECT_EQ(got.input_perm, want.input_perm) << name;

    const std::vector<float> a = DequantizeLinear(want), b = DequantizeLinear(got);
    int64_t different = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      if (i / kK == 7) {
        ASSERT_EQ(b[i], 0) << name;
      }
      different += std::fabs(a[i] - b[i]) > 1e-6f;
    }
    if (options.refinements == 0) {
      EXPECT_LE(static_cast<double>(different), kDifferentCodes * kN * kK) << name;
    }
    // With known coding errors the target is not W: the report of the CPU stands in for the definition.
    const double error = with_coding ? cpu.rounded.report.output_error : OutputError(linear_.weight, want, cpu.hessian);
    EXPECT_NEAR(gpu.rounded.report.output_error / error, 1, kErrorBound) << name;
    if (!with_coding) {
      EXPECT_NEAR(OutputError(linear_.weight, got, cpu.hessian) / error, 1, kErrorBound) << name;
    }
  }

  std::mt19937_64 random_{5};
  std::unique_ptr<RoundingDevice> cpu_ = CreateCpuRoundingDevice(2), gpu_;
  std::vector<float> x_, coarse_;
  DenseLinear linear_;
  InputPlan plan_{.block_bits = std::vector<uint8_t>(kK / 128, 4), .perm = {}};
};

TEST_F(CudaRoundingTest, AgreesWithTheCpu) {
  ExpectAgreement("nearest", {.compensate = false});
  ExpectAgreement("no search", {.order = RoundingOrder::kStored, .row_clips = {1.0f}, .search_groups = false});
  ExpectAgreement("stored", {.order = RoundingOrder::kStored});
  ExpectAgreement("within groups", {.order = RoundingOrder::kWithinGroup});
  ExpectAgreement("by group", {});
  ExpectAgreement("all columns", {.order = RoundingOrder::kAll});
  ExpectAgreement("refined", {.refinements = 2});
  ExpectAgreement("coding known", {}, /*with_coding=*/true);
}

TEST_F(CudaRoundingTest, FallsBackWithoutTokens) {
  const auto moments = *gpu_->CreateMoments(kK, false);
  const auto factor = *gpu_->Factorize(*moments, plan_, {});
  const auto rounded = gpu_->Round(linear_, plan_, *moments, *factor, {});
  ASSERT_TRUE(rounded.ok()) << rounded.status();
  EXPECT_NE(rounded->report.fallback, "");
  EXPECT_EQ(rounded->report.dead_columns, kK);
  const std::vector<float> coded = DequantizeLinear(rounded->tensors);
  for (size_t i = 0; i < coded.size(); ++i) ASSERT_NEAR(coded[i], linear_.weight[i], 0.01f);
}

}  // namespace
}  // namespace nibble
