// Linear layers against integer and double arithmetic, and the independence of rows.
#include <algorithm>
#include <cmath>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

// A quantized projection with valid random contents.
struct W4Tensors {
  int64_t n, k;
  std::vector<uint8_t> qweight, group_scale;
  std::vector<int8_t> group_min;
  std::vector<float> channel_scale;

  W4View View() const { return {n, k, qweight.data(), group_scale.data(), group_min.data(), channel_scale.data()}; }
  int64_t Weight8(int64_t row, int64_t column) const {
    const int64_t group = row * (k / kBlock) + column / kBlock;
    const int code = qweight[(row * k + column) / 2] >> (column % 2 * 4) & 15;
    return int64_t{code} * group_scale[group] + group_min[group];
  }
};

W4Tensors RandomW4(int64_t n, int64_t k, uint32_t seed) {
  std::mt19937 random(seed);
  W4Tensors t{n, k, {}, {}, {}, {}};
  t.qweight.resize(n * k / 2);
  for (uint8_t& x : t.qweight) x = random() % 8 == 0 ? 0xff : random();
  for (int64_t i = 0; i < n * k / kBlock; ++i) {
    const int scale = 1 + static_cast<int>(random() % 16), highest = std::min(119, 127 - 15 * scale);
    t.group_scale.push_back(static_cast<uint8_t>(scale));
    t.group_min.push_back(static_cast<int8_t>(static_cast<int>(random() % (highest + 120)) - 119));
  }
  for (int64_t i = 0; i < n; ++i) t.channel_scale.push_back(0.001f + 0.0001f * (random() % 100));
  return t;
}

struct Codes {
  std::vector<int8_t> codes;
  std::vector<float> scales;
};
Codes RandomCodes(int64_t rows, int64_t k, uint32_t seed) {
  std::mt19937 random(seed);
  Codes c;
  for (int64_t i = 0; i < rows * k; ++i) {
    const bool extreme = random() % 4 == 0;  // saturation is found with extremes
    c.codes.push_back(
        static_cast<int8_t>(extreme ? (random() % 16 == 0 ? -127 : 127) : static_cast<int>(random() % 255) - 127));
  }
  for (int64_t i = 0; i < rows; ++i) c.scales.push_back(i % 5 == 4 ? 0.0f : 0.01f * (1 + random() % 50));
  return c;
}

class LinearTest : public BackendTest {
 protected:
  std::vector<uint8_t> RunW4(const Weight& weight, const Codes& input, const std::vector<float>& bias, DType out_type) {
    const int64_t rows = static_cast<int64_t>(input.scales.size());
    Array<int8_t> codes(ops(), input.codes);
    Array<float> scales(ops(), input.scales);
    std::vector<int32_t> sums(rows);
    for (int64_t i = 0; i < rows * weight.k; ++i) sums[i / weight.k] += input.codes[i];
    Array<int32_t> code_sums(ops(), sums);
    Array<float> bias_array(ops(), bias);
    RowsArray out(ops(), out_type, rows, weight.n);
    ops().Linear({.input = {.rows = rows,
                            .k = weight.k,
                            .codes = codes.data(),
                            .scales = scales.data(),
                            .code_sums = code_sums.data()},
                  .weight = &weight,
                  .bias = bias.empty() ? nullptr : bias_array.data(),
                  .out = out.rows()});
    return out.Bytes();
  }

  std::vector<uint8_t> RunDense(const Weight& weight, DType in_type, const std::vector<float>& x, int64_t rows,
                                const std::vector<float>& bias, DType out_type) {
    RowsArray in(ops(), in_type, rows, weight.k, x);
    Array<float> bias_array(ops(), bias);
    RowsArray out(ops(), out_type, rows, weight.n);
    ops().Linear({.input = {.rows = rows, .k = weight.k, .dense = in.rows()},
                  .weight = &weight,
                  .bias = bias.empty() ? nullptr : bias_array.data(),
                  .out = out.rows()});
    return out.Bytes();
  }
};

TEST_P(LinearTest, W4IsTheExactIntegerSum) {
  for (const W4Case& c : kW4Cases) {
    // Two projections stacked, the first with an odd number of rows where there are enough.
    const int64_t first = c.n > 8 ? c.n / 2 | 1 : c.n;
    std::vector<W4Tensors> parts = {RandomW4(first, c.k, 1)};
    if (first < c.n) parts.push_back(RandomW4(c.n - first, c.k, 2));
    std::vector<W4View> views;
    for (const W4Tensors& part : parts) views.push_back(part.View());
    auto weight = ops().PackW4(views);
    ASSERT_TRUE(weight.ok()) << weight.status();
    const Codes input = RandomCodes(c.rows, c.k, 3);
    const std::vector<float> bias = c.bias ? Values(Fill::kNormal, c.n, 4) : std::vector<float>();
    const std::vector<uint8_t> got = RunW4(**weight, input, bias, c.out);
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t n = 0; n < c.n; ++n) {
        const W4Tensors& part = n < first ? parts[0] : parts[1];
        const int64_t row = n < first ? n : n - first;
        int64_t sum = 0;
        for (int64_t k = 0; k < c.k; ++k) sum += input.codes[t * c.k + k] * part.Weight8(row, k);
        const float scale = input.scales[t] * part.channel_scale[row];
        float want = static_cast<float>(sum) * scale;
        if (c.bias) want = want + bias[n];
        const int64_t at = t * c.n + n;
        if (c.out == DType::kF32) {
          float value;
          std::memcpy(&value, &got[at * 4], 4);
          ASSERT_EQ(value, want) << "[" << t << ", " << n << "] of " << c.rows << "x" << c.n << "x" << c.k;
        } else {
          uint16_t bits;
          std::memcpy(&bits, &got[at * 2], 2);
          ASSERT_EQ(bits, ToBF16(want).bits) << "[" << t << ", " << n << "] of " << c.rows << "x" << c.n << "x" << c.k;
        }
      }
    }
  }
}

// Also where every worker of a kernel goes round its pipeline several times.
TEST_P(LinearTest, W4BiasIsAddedToTheSum) {
  constexpr int64_t kN = 5376, kK = 8192;
  const W4Tensors tensors = RandomW4(kN, kK, 11);
  const W4View view = tensors.View();
  auto weight = ops().PackW4({&view, 1});
  ASSERT_TRUE(weight.ok()) << weight.status();
  const std::vector<float> bias = Values(Fill::kNormal, kN, 12);
  const std::vector<int64_t> batches = exact() ? std::vector<int64_t>{1} : std::vector<int64_t>{1, 16, 32, 64, 128, 256};
  for (const int64_t rows : batches) {
    const Codes input = RandomCodes(rows, kK, 13);
    const std::vector<uint8_t> plain = RunW4(**weight, input, {}, DType::kF32);
    const std::vector<uint8_t> biased = RunW4(**weight, input, bias, DType::kF32);
    for (int64_t i = 0; i < rows * kN; ++i) {
      float sum, got;
      std::memcpy(&sum, &plain[i * 4], 4);
      std::memcpy(&got, &biased[i * 4], 4);
      ASSERT_EQ(got, sum + bias[i % kN]) << "[" << i / kN << ", " << i % kN << "] of " << rows << " rows";
    }
  }
}

// f32 rows everywhere, and bf16 rows of the specification; another backend may add those in its own order.
TEST_P(LinearTest, DenseIsOneChainOfFusedMultiplyAdds) {
  for (const DenseCase& c : kDenseCases) {
    if (!exact() && c.in == DType::kBF16) continue;
    std::vector<BF16> w;
    for (float x : Values(Fill::kNormal, c.n * c.k, 5)) w.push_back(ToBF16(x));
    const DenseView view{c.n, c.k, w.data()};
    auto weight = ops().PackDense({&view, 1});
    ASSERT_TRUE(weight.ok()) << weight.status();
    const std::vector<float> x = Rounded(c.in, Values(Fill::kOutliers, c.rows * c.k, 6));
    const std::vector<float> bias = c.bias ? Values(Fill::kNormal, c.n, 7) : std::vector<float>();
    const std::vector<uint8_t> got = RunDense(**weight, c.in, x, c.rows, bias, c.out);
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t n = 0; n < c.n; ++n) {
        float want = 0;
        for (int64_t k = 0; k < c.k; ++k) want = std::fma(x[t * c.k + k], ToFloat(w[n * c.k + k]), want);
        if (c.bias) want = want + bias[n];
        const int64_t at = t * c.n + n;
        if (c.out == DType::kF32) {
          float value;
          std::memcpy(&value, &got[at * 4], 4);
          ASSERT_EQ(value, want) << "[" << t << ", " << n << "] of " << c.rows << "x" << c.n << "x" << c.k;
        } else {
          uint16_t bits;
          std::memcpy(&bits, &got[at * 2], 2);
          ASSERT_EQ(bits, ToBF16(want).bits) << "[" << t << ", " << n << "] of " << c.rows << "x" << c.n << "x" << c.k;
        }
      }
    }
  }
}

TEST_P(LinearTest, DenseAgainstDouble) {
  for (const DenseCase& c : kDenseCases) {
    std::vector<BF16> w;
    for (float x : Values(Fill::kNormal, c.n * c.k, 5)) w.push_back(ToBF16(x));
    const DenseView view{c.n, c.k, w.data()};
    auto weight = ops().PackDense({&view, 1});
    ASSERT_TRUE(weight.ok()) << weight.status();
    const std::vector<float> x = Rounded(c.in, Values(Fill::kOutliers, c.rows * c.k, 6));
    const std::vector<float> bias = c.bias ? Values(Fill::kNormal, c.n, 7) : std::vector<float>();
    const std::vector<uint8_t> bytes = RunDense(**weight, c.in, x, c.rows, bias, c.out);
    std::vector<float> got;
    std::vector<double> want, bound;
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t n = 0; n < c.n; ++n) {
        double sum = c.bias ? bias[n] : 0, magnitude = std::abs(sum);
        for (int64_t k = 0; k < c.k; ++k) {
          const double product = double{x[t * c.k + k]} * ToFloat(w[n * c.k + k]);
          sum += product;
          magnitude += std::abs(product);
        }
        want.push_back(sum);
        // An f32 accumulator, added to K times or fewer; a tensor core may cut instead of rounding.
        bound.push_back(OutputUlp(c.out, sum) + magnitude * static_cast<double>(c.k + 1) * 0x1p-23);
        const int64_t at = t * c.n + n;
        if (c.out == DType::kF32) {
          float value;
          std::memcpy(&value, &bytes[at * 4], 4);
          got.push_back(value);
        } else {
          BF16 half;
          std::memcpy(&half, &bytes[at * 2], 2);
          got.push_back(ToFloat(half));
        }
      }
    }
    ExpectClose(got, want, bound, c.n, std::to_string(c.rows) + "x" + std::to_string(c.n) + "x" + std::to_string(c.k));
  }
}

// A row alone has the bits it has among any others.
TEST_P(LinearTest, RowsDoNotDependOnTheBatch) {
  constexpr int64_t kN = 130, kK = 256, kRows = 300;
  const W4Tensors tensors = RandomW4(kN, kK, 8);
  const W4View view = tensors.View();
  auto w4 = ops().PackW4({&view, 1});
  ASSERT_TRUE(w4.ok());
  std::vector<BF16> w;
  for (float x : Values(Fill::kNormal, kN * kK, 9)) w.push_back(ToBF16(x));
  const DenseView dense_view{kN, kK, w.data()};
  auto dense = ops().PackDense({&dense_view, 1});
  ASSERT_TRUE(dense.ok());

  const Codes all_codes = RandomCodes(kRows, kK, 10);
  const std::vector<float> all_values = Values(Fill::kNormal, kRows * kK, 11);
  const std::vector<uint8_t> want_w4 = RunW4(**w4, all_codes, {}, DType::kF32);
  const std::vector<uint8_t> want_dense = RunDense(**dense, DType::kF32, all_values, kRows, {}, DType::kF32);
  for (int64_t batch : {1, 2, 3, 7, 12, 13, 64}) {
    for (int64_t begin : {int64_t{0}, int64_t{5}, kRows - batch}) {
      const Codes part = {{all_codes.codes.begin() + begin * kK, all_codes.codes.begin() + (begin + batch) * kK},
                          {all_codes.scales.begin() + begin, all_codes.scales.begin() + begin + batch}};
      const std::vector<float> values(all_values.begin() + begin * kK, all_values.begin() + (begin + batch) * kK);
      const int64_t from = begin * kN * 4, bytes = batch * kN * 4;
      EXPECT_EQ(RunW4(**w4, part, {}, DType::kF32),
                std::vector<uint8_t>(want_w4.begin() + from, want_w4.begin() + from + bytes))
          << "w4, batch " << batch << " from row " << begin;
      EXPECT_EQ(RunDense(**dense, DType::kF32, values, batch, {}, DType::kF32),
                std::vector<uint8_t>(want_dense.begin() + from, want_dense.begin() + from + bytes))
          << "dense, batch " << batch << " from row " << begin;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearTest, ::testing::ValuesIn(AllBackends()),
                         [](const auto& backend) { return backend.param.name; });

}  // namespace
}  // namespace nibble::testing
