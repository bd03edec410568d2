// The row operators on the GPU against the specification, bit by bit, where their kernels differ from one another: few
// rows and many, one block a row and a cluster, values that a shortcut must recognise and leave to the long way.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

struct Shape {
  int64_t rows, k, hadamard;
};

class CudaRowsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const Backend& cuda = AllBackends().back();
    if (cuda.ops == nullptr) GTEST_SKIP() << cuda.why_not;
    cuda_ = cuda.ops.get();
  }

  // What an operator wrote, as bytes.
  struct Outcome {
    std::vector<int8_t> codes;
    std::vector<uint8_t> exponents, residual;
    std::vector<float> scales;
    std::vector<int32_t> sums;
  };
  enum class Op : uint8_t { kQuantize, kNorm, kSilu };

  // `x`: the rows, or gate and up. wide_every: every so manieth block has 8 bits; 0: none.
  static Outcome Run(Ops& ops, Op op, const Shape& shape, int wide_every, const std::vector<float>& x,
                     const std::vector<float>& delta, const std::vector<BF16>& weight) {
    const auto [rows, k, hadamard] = shape;
    std::vector<uint8_t> bits;
    for (int64_t b = 0; b < k / kBlock; ++b) bits.push_back(wide_every != 0 && b % wide_every == 0 ? 8 : 4);
    const Array<uint8_t> device_bits(ops, bits);
    const InputCoding coding = {.k = k, .quantized = true, .block_bits = device_bits.data(), .hadamard = hadamard};
    const Array<int8_t> codes(ops, rows * k);
    const Array<uint8_t> exponents(ops, rows * (k / kBlock));
    const Array<float> scales(ops, rows);
    const Array<int32_t> sums(ops, rows);
    LinearInput out = {.rows = rows,
                       .k = k,
                       .codes = codes.data(),
                       .scales = scales.data(),
                       .code_sums = sums.data(),
                       .exponents = exponents.data()};
    const RowsArray in(ops, DType::kBF16, rows, op == Op::kSilu ? 2 * k : k, x);
    Outcome outcome;
    if (op == Op::kQuantize) {
      ops.Quantize({.in = in.rows(), .coding = &coding, .out = &out});
    } else if (op == Op::kSilu) {
      ops.SiluMulQuantize({.gate_up = in.rows(), .coding = &coding, .out = &out});
    } else {
      const RowsArray device_delta(ops, DType::kBF16, rows, k, delta);
      const Array<BF16> weights(ops, weight);
      ops.AddNormQuantize({.residual = in.rows(),
                           .delta = &device_delta.rows(),
                           .weight = weights.data(),
                           .eps = 1e-5f,
                           .coding = &coding,
                           .out = &out});
      outcome.residual = in.Bytes();
    }
    outcome.codes = codes.Get();
    outcome.exponents = exponents.Get();
    outcome.scales = scales.Get();
    outcome.sums = sums.Get();
    return outcome;
  }

  void ExpectEqual(Op op, const Shape& shape, int wide_every, const std::vector<float>& x,
                   const std::vector<float>& delta = {}, const std::vector<BF16>& weight = {}) {
    SCOPED_TRACE("op " + std::to_string(static_cast<int>(op)) + " rows " + std::to_string(shape.rows) + " k " +
                 std::to_string(shape.k) + " hadamard " + std::to_string(shape.hadamard) + " wide every " +
                 std::to_string(wide_every));
    const Outcome want = Run(*AllBackends()[0].ops, op, shape, wide_every, x, delta, weight);
    const Outcome got = Run(*cuda_, op, shape, wide_every, x, delta, weight);
    EXPECT_EQ(got.scales, want.scales);
    EXPECT_EQ(got.sums, want.sums);
    EXPECT_TRUE(got.exponents == want.exponents);
    EXPECT_TRUE(got.codes == want.codes);
    EXPECT_TRUE(got.residual == want.residual);
  }

  Ops* cuda_ = nullptr;
};

TEST_F(CudaRowsTest, FewAndManyRows) {
  for (const Shape& shape : {Shape{1, 8192, 0}, Shape{3, 28672, 0}, Shape{5, 12288, 0}, Shape{7, 640, 0},
                             Shape{270, 128, 0}, Shape{700, 3200, 0}, Shape{266, 8192, 0}}) {
    const int64_t count = shape.rows * shape.k;
    std::vector<BF16> weight;
    for (float w : Values(Fill::kNormal, shape.k, 3)) weight.push_back(ToBF16(w));
    for (Fill fill : {Fill::kNormal, Fill::kOutliers, Fill::kConstant}) {
      const std::vector<float> x = Values(fill, 2 * count, 1);
      const std::vector<float> half(x.begin(), x.begin() + count);
      for (int wide_every : {0, 1, 5}) {
        ExpectEqual(Op::kQuantize, shape, wide_every, half);
        ExpectEqual(Op::kSilu, shape, wide_every, x);
        ExpectEqual(Op::kNorm, shape, wide_every, half, Values(Fill::kNormal, count, 2), weight);
      }
    }
  }
}

TEST_F(CudaRowsTest, EveryHadamardSize) {
  for (int64_t hadamard = 2; hadamard <= 4096; hadamard *= 2) {
    for (int64_t rows : {2, 530}) {
      const Shape shape = {rows, rows == 2 ? 12288 : 4096, hadamard};
      const std::vector<float> x = Values(Fill::kOutliers, 2 * shape.rows * shape.k, 4);
      ExpectEqual(Op::kSilu, shape, 5, x);
      ExpectEqual(Op::kQuantize, shape, 5, {x.begin(), x.begin() + shape.rows * shape.k});
    }
  }
}

// Every finite gate, against several ups: the quick sigmoid must round as the specified one does, or not be used. Seen
// without coding, where every bit counts.
TEST_F(CudaRowsTest, EveryGate) {
  constexpr int64_t kK = 1024, kRows = 65536 / kK;
  for (float up : {1.0f, 1.3671875f, -0.78515625f, 1.9921875f, 0.0087890625f, 1e-30f}) {
    std::vector<float> x(2 * kRows * kK, up);
    for (int64_t i = 0; i < kRows * kK; ++i) {
      const float gate = std::bit_cast<float>(static_cast<uint32_t>(i) << 16);
      x[i / kK * 2 * kK + i % kK] = std::isfinite(gate) ? gate : 0.0f;
    }
    const InputCoding coding = {.k = kK, .quantized = false};
    std::vector<uint8_t> results[2];
    for (int i = 0; i < 2; ++i) {
      Ops& ops = i == 0 ? *AllBackends()[0].ops : *cuda_;
      const RowsArray in(ops, DType::kBF16, kRows, 2 * kK, x), dense(ops, DType::kBF16, kRows, kK);
      LinearInput out = {.rows = kRows, .k = kK, .dense = dense.rows()};
      ops.SiluMulQuantize({.gate_up = in.rows(), .coding = &coding, .out = &out});
      results[i] = dense.Bytes();
    }
    EXPECT_TRUE(results[0] == results[1]) << "up " << up;
  }
}

// Scales that are divided by in the plain way: tiny, huge, and the one whose quotients a product with two parts misses.
TEST_F(CudaRowsTest, PlainRows) {
  for (int64_t rows : {2, 2200}) {
    const Shape shape = {rows, 1024, 0};
    for (float factor : {1e-30f, 1e-38f, 1e25f}) {
      std::vector<float> x = Values(Fill::kNormal, 2 * rows * shape.k, 5);
      for (float& value : x) value *= factor;
      ExpectEqual(Op::kQuantize, shape, 3, {x.begin(), x.begin() + rows * shape.k});
      ExpectEqual(Op::kSilu, shape, 3, x);
    }
    // Halves of the largest value lie in the middle between two codes.
    std::vector<float> x = Values(Fill::kNormal, rows * shape.k, 6);
    for (size_t i = 0; i < x.size(); ++i) {
      if (i % 3 == 0) x[i] = 4.0f / static_cast<float>(1 << i % 7);
    }
    ExpectEqual(Op::kQuantize, shape, 3, x);
  }
}

}  // namespace
}  // namespace nibble::testing
