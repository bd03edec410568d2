// Residual + norm, SiLU · up, embedding and the coding of a linear's input.
#include <cmath>
#include <numeric>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

// How a case's rows are coded: on the host for references, on a backend's device for its operators.
struct Coding {
  std::vector<uint8_t> block_bits;
  std::vector<int32_t> perm;
  InputCoding view;  // block_bits and perm point to the host
};

std::unique_ptr<Coding> MakeCoding(const CodingCase& c) {
  auto coding = std::make_unique<Coding>();
  for (int64_t b = 0; b < c.k / kBlock; ++b) coding->block_bits.push_back(b < c.wide_blocks ? 8 : 4);
  if (c.perm) {
    coding->perm.resize(c.k);
    std::iota(coding->perm.begin(), coding->perm.end(), 0);
    std::shuffle(coding->perm.begin(), coding->perm.end(), std::mt19937(5));
  }
  coding->view = {.k = c.k,
                  .quantized = c.quantized,
                  .block_bits = c.quantized ? coding->block_bits.data() : nullptr,
                  .perm = c.perm ? coding->perm.data() : nullptr,
                  .hadamard = c.hadamard};
  return coding;
}

class DeviceCoding {
 public:
  DeviceCoding(Ops& ops, const Coding& coding)
      : block_bits_(ops, coding.block_bits), perm_(ops, coding.perm), view_(coding.view) {
    if (view_.block_bits != nullptr) view_.block_bits = block_bits_.data();
    if (view_.perm != nullptr) view_.perm = perm_.data();
  }
  const InputCoding* view() const { return &view_; }

 private:
  Array<uint8_t> block_bits_;
  Array<int32_t> perm_;
  InputCoding view_;
};

// A linear's input on the device, and back on the host.
struct CodedRows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  std::vector<uint8_t> exponents;
  std::vector<uint8_t> dense;  // bytes

  bool operator==(const CodedRows& o) const {
    return codes == o.codes && sums == o.sums && exponents == o.exponents && dense == o.dense &&
           scales.size() == o.scales.size() &&
           (scales.empty() || std::memcmp(scales.data(), o.scales.data(), scales.size() * 4) == 0);
  }
  // Rows [begin, begin + rows).
  CodedRows Slice(int64_t begin, int64_t rows) const {
    const auto cut = [&](const auto& all) {
      const int64_t each = static_cast<int64_t>(all.size()) / std::max<int64_t>(1, total_rows);
      return std::decay_t<decltype(all)>(all.begin() + begin * each, all.begin() + (begin + rows) * each);
    };
    return {cut(codes), cut(scales), cut(sums), cut(exponents), cut(dense), rows};
  }
  int64_t total_rows = 0;
};

class CodedOutput {
 public:
  CodedOutput(Ops& ops, const InputCoding& coding, int64_t rows, DType dense)
      : quantized_(coding.quantized),
        rows_(rows),
        codes_(ops, quantized_ ? rows * coding.k : 0),
        scales_(ops, quantized_ ? rows : 0),
        sums_(ops, quantized_ ? rows : 0),
        exponents_(ops, quantized_ ? rows * (coding.k / kBlock) : 0),
        dense_(ops, dense, quantized_ ? 0 : rows, coding.k) {
    input_ = {.rows = rows, .k = coding.k};
    if (quantized_) {
      input_.codes = codes_.data();
      input_.scales = scales_.data();
      input_.code_sums = sums_.data();
      input_.exponents = exponents_.data();
    } else {
      input_.dense = dense_.rows();
    }
  }
  LinearInput* input() { return &input_; }
  // NaNs become one NaN: their payload is no backend's business.
  CodedRows Get() const {
    CodedRows rows = {codes_.Get(), scales_.Get(), sums_.Get(), exponents_.Get(), dense_.Bytes(), rows_};
    for (float& scale : rows.scales) {
      if (std::isnan(scale)) scale = std::nanf("");
    }
    const std::vector<float> values = dense_.Get();
    const size_t each = values.empty() ? 0 : rows.dense.size() / values.size();
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i])) std::memset(&rows.dense[i * each], 0xff, each);
    }
    return rows;
  }

 private:
  bool quantized_;
  int64_t rows_;
  Array<int8_t> codes_;
  Array<float> scales_;
  Array<int32_t> sums_;
  Array<uint8_t> exponents_;
  RowsArray dense_;
  LinearInput input_;
};

// docs/numerics.md, written as it reads. x: one row in f32, after Hadamard and permutation.
void ExpectCoded(const std::vector<float>& x, const Coding& coding, const CodedRows& got, int64_t row,
                 const std::string& what) {
  const int64_t k = coding.view.k, blocks = k / kBlock;
  float scale = 0;
  for (int64_t i = 0; i < k; ++i) {
    scale = std::max(scale, std::abs(x[i]) / (coding.block_bits[i / kBlock] == 8 ? 127.0f : 112.0f));
  }
  ASSERT_EQ(got.scales[row], scale) << what << " row " << row;
  int32_t sum = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    std::vector<int> want(kBlock, 0);
    int want_exponent = 0;
    if (scale > 0) {
      std::vector<double> u(kBlock);
      double amax = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        u[i] = x[b * kBlock + i] / scale;  // f32 division, exact in double
        amax = std::max(amax, std::abs(u[i]));
      }
      const auto code = [&](int e, int limit, std::vector<int>* out) {
        double error = 0;
        for (int64_t i = 0; i < kBlock; ++i) {
          const int a = static_cast<int>(std::clamp(std::nearbyint(u[i] / (1 << e)), -1.0 * limit, 1.0 * limit));
          (*out)[i] = a << e;
          error += (u[i] - (*out)[i]) * (u[i] - (*out)[i]);
        }
        return error;
      };
      if (coding.block_bits[b] == 8) {
        code(0, 127, &want);
      } else {
        int e = 0;
        while (e < 4 && amax > 7 << e) ++e;
        const double error = code(e, 7, &want);
        want_exponent = e;
        std::vector<int> finer(kBlock);
        const double finer_error = e > 0 ? code(e - 1, 7, &finer) : error;
        const bool close = std::abs(error - finer_error) < 1e-4 * error;  // f32 sums may decide a near tie otherwise
        if (finer_error < error) {
          want_exponent = e - 1;
          want = finer;
        }
        if (close && got.exponents[row * blocks + b] != want_exponent) {
          want_exponent = want_exponent == e ? e - 1 : e;
          code(want_exponent, 7, &want);
        }
      }
    }
    ASSERT_EQ(got.exponents[row * blocks + b], want_exponent) << what << " row " << row << " block " << b;
    for (int64_t i = 0; i < kBlock; ++i) {
      ASSERT_EQ(got.codes[row * k + b * kBlock + i], want[i]) << what << " [" << row << ", " << b * kBlock + i << "]";
      sum += want[i];
    }
  }
  ASSERT_EQ(got.sums[row], sum) << what << " row " << row;
}

// Hadamard by its definition, then the permutation.
std::vector<float> Transformed(const Coding& coding, std::vector<float> x) {
  const int64_t h = coding.view.hadamard;
  if (h > 1) {
    std::vector<float> y = x;
    for (int64_t distance = 1; distance < h; distance *= 2) {  // in f32, as specified; checked against +-1 sums below
      std::vector<float> z(y.size());
      for (size_t i = 0; i < y.size(); ++i) {
        z[i] = (i / distance) % 2 == 0 ? y[i] + y[i + distance] : y[i - distance] - y[i];
      }
      y = z;
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(h));
    for (size_t i = 0; i < y.size(); ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t j = 0; j < h; ++j) {
        const double term = x[i / h * h + j];
        sum += std::popcount(static_cast<uint64_t>(j & (i % h))) % 2 == 0 ? term : -term;
        magnitude += std::abs(term);
      }
      y[i] *= scale;
      EXPECT_NEAR(y[i], sum / std::sqrt(static_cast<double>(h)), magnitude * 1e-6);
    }
    x = y;
  }
  if (!coding.perm.empty()) {
    std::vector<float> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = x[coding.perm[i]];
    x = y;
  }
  return x;
}

std::string Name(const CodingCase& c, Fill fill) {
  return "k " + std::to_string(c.k) + " wide " + std::to_string(c.wide_blocks) + " perm " + std::to_string(c.perm) +
         " hadamard " + std::to_string(c.hadamard) + " fill " + std::to_string(static_cast<int>(fill));
}

class RowsTest : public BackendTest {
 protected:
  CodedRows RunQuantize(const Coding& coding, DType dtype, int64_t rows, const std::vector<float>& x) {
    const DeviceCoding on_device(ops(), coding);
    RowsArray in(ops(), dtype, rows, coding.view.k, x);
    CodedOutput out(ops(), coding.view, rows, dtype);
    ops().Quantize({.in = in.rows(), .coding = on_device.view(), .out = out.input()});
    return out.Get();
  }

  struct Normed {
    CodedRows coded;
    std::vector<float> residual;
  };
  Normed RunAddNorm(const Coding& coding, DType dtype, int64_t rows, const std::vector<float>& x,
                    const std::vector<float>* delta, const std::vector<BF16>& weight,
                    const std::vector<int32_t>* index) {
    const DeviceCoding on_device(ops(), coding);
    RowsArray residual(ops(), dtype, rows, coding.view.k, x);
    RowsArray delta_array(ops(), dtype, delta == nullptr ? 0 : rows, coding.view.k,
                          delta == nullptr ? std::vector<float>() : *delta);
    Array<BF16> weight_array(ops(), weight);
    Array<int32_t> index_array(ops(), index == nullptr ? std::vector<int32_t>() : *index);
    const int64_t out_rows = index == nullptr ? rows : static_cast<int64_t>(index->size());
    CodedOutput out(ops(), coding.view, out_rows, dtype);
    ops().AddNormQuantize({.residual = residual.rows(),
                           .delta = delta == nullptr ? nullptr : &delta_array.rows(),
                           .weight = weight_array.data(),
                           .eps = 1e-5f,
                           .row_index = index == nullptr ? nullptr : index_array.data(),
                           .coding = on_device.view(),
                           .out = out.input()});
    return {out.Get(), residual.Get()};
  }

  CodedRows RunSiluMul(const Coding& coding, DType dtype, int64_t rows, const std::vector<float>& gate_up) {
    const DeviceCoding on_device(ops(), coding);
    RowsArray in(ops(), dtype, rows, 2 * coding.view.k, gate_up);
    CodedOutput out(ops(), coding.view, rows, dtype);
    ops().SiluMulQuantize({.gate_up = in.rows(), .coding = on_device.view(), .out = out.input()});
    return out.Get();
  }
};

std::vector<float> Row(const std::vector<float>& all, int64_t row, int64_t cols) {
  return {all.begin() + row * cols, all.begin() + (row + 1) * cols};
}

TEST_P(RowsTest, QuantizeFollowsTheFormat) {
  for (const CodingCase& c : kCodingCases) {
    if (!c.quantized) continue;
    for (Fill fill : kAllFills) {
      const auto coding = MakeCoding(c);
      const std::vector<float> x = Rounded(c.dtype, Values(fill, c.rows * c.k, 21));
      const CodedRows got = RunQuantize(*coding, c.dtype, c.rows, x);
      for (int64_t t = 0; t < c.rows; ++t) {
        ExpectCoded(Transformed(*coding, Row(x, t, c.k)), *coding, got, t, Name(c, fill));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(RowsTest, UnquantizedRowsAreCopied) {
  for (const CodingCase& c : kCodingCases) {
    if (c.quantized || c.perm || c.hadamard != 0) continue;
    const auto coding = MakeCoding(c);
    const std::vector<float> x = Values(Fill::kOutliers, c.rows * c.k, 22);
    RowsArray in(ops(), c.dtype, c.rows, c.k, x);
    EXPECT_EQ(RunQuantize(*coding, c.dtype, c.rows, x).dense, in.Bytes());
  }
}

// A value that is not finite must not become a plausible number: the row's scale says so.
TEST_P(RowsTest, NotFiniteStaysVisible) {
  const auto coding = MakeCoding(kCodingCases[2]);
  for (float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    std::vector<float> x = Values(Fill::kNormal, 3 * 256, 23);
    x[256 + 131] = bad;
    const CodedRows got = RunQuantize(*coding, DType::kBF16, 3, x);
    EXPECT_TRUE(std::isfinite(got.scales[0]));
    EXPECT_FALSE(std::isfinite(got.scales[1]));
    EXPECT_TRUE(std::isfinite(got.scales[2]));
  }
}

TEST_P(RowsTest, AddNormAgainstDouble) {
  for (const CodingCase& c : kCodingCases) {
    for (Fill fill : {Fill::kNormal, Fill::kOutliers, Fill::kZeros, Fill::kConstant}) {
      CodingCase dense = c;  // dense output shows the norm itself; coding is tested above
      dense.quantized = dense.perm = false;
      dense.hadamard = 0;
      const auto coding = MakeCoding(dense);
      const std::vector<float> x = Rounded(c.dtype, Values(fill, c.rows * c.k, 24));
      const std::vector<float> delta = Rounded(c.dtype, Values(Fill::kNormal, c.rows * c.k, 25));
      std::vector<BF16> weight;
      for (float w : Values(Fill::kNormal, c.k, 26)) weight.push_back(ToBF16(w));
      const Normed got = RunAddNorm(*coding, c.dtype, c.rows, x, &delta, weight, nullptr);
      std::vector<float> sum(x.size());
      for (size_t i = 0; i < x.size(); ++i) sum[i] = x[i] + delta[i];
      sum = Rounded(c.dtype, sum);
      ASSERT_EQ(got.residual, sum) << Name(c, fill);

      std::vector<double> want(x.size()), bound(x.size());
      std::vector<float> out(x.size());
      for (int64_t t = 0; t < c.rows; ++t) {
        double squares = 0;
        for (int64_t i = 0; i < c.k; ++i) squares += double{sum[t * c.k + i]} * sum[t * c.k + i];
        for (int64_t i = 0; i < c.k; ++i) {
          const int64_t at = t * c.k + i;
          want[at] = sum[at] / std::sqrt(squares / c.k + 1e-5f) * ToFloat(weight[i]);
          bound[at] = OutputUlp(c.dtype, want[at]) + std::abs(want[at]) * 1e-5;
          if (c.dtype == DType::kF32) {
            std::memcpy(&out[at], &got.coded.dense[at * 4], 4);
          } else {
            BF16 half;
            std::memcpy(&half, &got.coded.dense[at * 2], 2);
            out[at] = ToFloat(half);
          }
        }
      }
      ExpectClose(out, want, bound, c.k, Name(c, fill));
    }
  }
}

// Codes are made from the f32 norm, without a rounding in between: so f32 rows, coded, equal Quantize of the f32 norm.
TEST_P(RowsTest, AddNormCodesItsResult) {
  for (const CodingCase& c : kCodingCases) {
    CodingCase dense = c;
    dense.quantized = dense.perm = false;
    dense.hadamard = 0;
    const auto plain = MakeCoding(dense);
    const auto coding = MakeCoding(c);
    const std::vector<float> x = Values(Fill::kOutliers, c.rows * c.k, 27);
    const std::vector<BF16> weight(c.k, ToBF16(1.5f));
    const Normed norm = RunAddNorm(*plain, DType::kF32, c.rows, x, nullptr, weight, nullptr);
    std::vector<float> y(x.size());
    std::memcpy(y.data(), norm.coded.dense.data(), y.size() * 4);
    EXPECT_EQ(RunAddNorm(*coding, DType::kF32, c.rows, x, nullptr, weight, nullptr).coded,
              RunQuantize(*coding, DType::kF32, c.rows, y));
  }
}

TEST_P(RowsTest, RowIndexPicksRowsAndDeltaGoesToAll) {
  const CodingCase& c = kCodingCases[4];
  const auto coding = MakeCoding(c);
  const std::vector<float> x = Values(Fill::kNormal, c.rows * c.k, 28), delta = Values(Fill::kNormal, c.rows * c.k, 29);
  const std::vector<BF16> weight(c.k, ToBF16(1.0f));
  const std::vector<int32_t> index = {16, 3, 3, 0};
  const Normed all = RunAddNorm(*coding, c.dtype, c.rows, x, &delta, weight, nullptr);
  const Normed some = RunAddNorm(*coding, c.dtype, c.rows, x, &delta, weight, &index);
  EXPECT_EQ(some.residual, all.residual);
  for (size_t i = 0; i < index.size(); ++i) {
    EXPECT_TRUE(some.coded.Slice(static_cast<int64_t>(i), 1) == all.coded.Slice(index[i], 1)) << "row " << i;
  }
  const std::vector<int32_t> none;
  EXPECT_EQ(RunAddNorm(*coding, c.dtype, c.rows, x, &delta, weight, &none).residual, all.residual);
}

TEST_P(RowsTest, SiluMulAgainstDouble) {
  for (const CodingCase& c : kCodingCases) {
    for (Fill fill : {Fill::kNormal, Fill::kOutliers, Fill::kZeros, Fill::kTiny}) {
      CodingCase dense = c;
      dense.quantized = dense.perm = false;
      dense.hadamard = 0;
      const std::vector<float> x = Rounded(c.dtype, Values(fill, c.rows * c.k * 2, 30));
      const CodedRows got = RunSiluMul(*MakeCoding(dense), c.dtype, c.rows, x);
      std::vector<double> want, bound;
      std::vector<float> out;
      for (int64_t t = 0; t < c.rows; ++t) {
        for (int64_t i = 0; i < c.k; ++i) {
          const double gate = x[t * 2 * c.k + i], up = x[t * 2 * c.k + c.k + i];
          want.push_back(gate / (1 + std::exp(-gate)) * up);
          // Where exp overflows f32 (gate < -88) the result is 0 instead of something below 1e-36.
          bound.push_back(OutputUlp(c.dtype, want.back()) + std::abs(want.back()) * 1e-6 + std::abs(gate * up) * 2e-38);
          const int64_t at = t * c.k + i;
          float value;
          if (c.dtype == DType::kF32) {
            std::memcpy(&value, &got.dense[at * 4], 4);
          } else {
            BF16 half;
            std::memcpy(&half, &got.dense[at * 2], 2);
            value = ToFloat(half);
          }
          out.push_back(value);
        }
      }
      ExpectClose(out, want, bound, c.k, Name(c, fill));
      // Coded = the rounded product, coded.
      std::vector<float> rounded(out.begin(), out.end());
      const auto coding = MakeCoding(c);
      EXPECT_EQ(RunSiluMul(*coding, c.dtype, c.rows, x), RunQuantize(*coding, c.dtype, c.rows, rounded))
          << Name(c, fill);
    }
  }
}

TEST_P(RowsTest, RowsDoNotDependOnTheBatch) {
  CodingCase c = kCodingCases[9];
  const auto coding = MakeCoding(c);
  const std::vector<float> x = Values(Fill::kOutliers, c.rows * c.k * 2, 31);
  const std::vector<BF16> weight(c.k, ToBF16(0.7f));
  const std::vector<float> first(x.begin(), x.begin() + c.rows * c.k);
  const CodedRows norm = RunAddNorm(*coding, c.dtype, c.rows, first, &first, weight, nullptr).coded;
  const CodedRows silu = RunSiluMul(*coding, c.dtype, c.rows, x);
  const CodedRows plain = RunQuantize(*coding, c.dtype, c.rows, first);
  for (int64_t batch : {1, 7, 64}) {
    const int64_t begin = c.rows - batch - 3;
    const std::vector<float> part(first.begin() + begin * c.k, first.begin() + (begin + batch) * c.k);
    const std::vector<float> wide(x.begin() + begin * 2 * c.k, x.begin() + (begin + batch) * 2 * c.k);
    EXPECT_TRUE(RunAddNorm(*coding, c.dtype, batch, part, &part, weight, nullptr).coded == norm.Slice(begin, batch));
    EXPECT_TRUE(RunSiluMul(*coding, c.dtype, batch, wide) == silu.Slice(begin, batch));
    EXPECT_TRUE(RunQuantize(*coding, c.dtype, batch, part) == plain.Slice(begin, batch));
  }
}

// Every backend gives the specification's bits.
TEST_P(RowsTest, EqualsTheSpecification) {
  const Backend& specification = AllBackends()[0];
  for (const CodingCase& c : kCodingCases) {
    const auto coding = MakeCoding(c);
    for (Fill fill : kAllFills) {
      const std::vector<float> x = Values(fill, c.rows * c.k * 2, 32);
      const std::vector<BF16> weight(c.k, ToBF16(0.3f));
      CodedRows results[2][3];
      for (int i = 0; i < 2; ++i) {
        Ops& backend = i == 0 ? *specification.ops : ops();
        const DeviceCoding on_device(backend, *coding);
        RowsArray gate_up(backend, c.dtype, c.rows, 2 * c.k, x);
        RowsArray residual(backend, c.dtype, c.rows, c.k, {x.begin(), x.begin() + c.rows * c.k});
        Array<BF16> weights(backend, weight);
        CodedOutput quantized(backend, coding->view, c.rows, c.dtype), normed(backend, coding->view, c.rows, c.dtype),
            silu(backend, coding->view, c.rows, c.dtype);
        backend.Quantize({.in = residual.rows(), .coding = on_device.view(), .out = quantized.input()});
        backend.AddNormQuantize({.residual = residual.rows(),
                                 .delta = &residual.rows(),
                                 .weight = weights.data(),
                                 .eps = 1e-6f,
                                 .coding = on_device.view(),
                                 .out = normed.input()});
        backend.SiluMulQuantize({.gate_up = gate_up.rows(), .coding = on_device.view(), .out = silu.input()});
        results[i][0] = quantized.Get();
        results[i][1] = normed.Get();
        results[i][2] = silu.Get();
      }
      EXPECT_TRUE(results[0][0] == results[1][0]) << "Quantize " << Name(c, fill);
      EXPECT_TRUE(results[0][1] == results[1][1]) << "AddNormQuantize " << Name(c, fill);
      EXPECT_TRUE(results[0][2] == results[1][2]) << "SiluMulQuantize " << Name(c, fill);
    }
  }
}

TEST_P(RowsTest, EmbedTakesIdsAndSlots) {
  constexpr int64_t kVocab = 50, kH = 37;
  std::vector<BF16> table;
  for (float x : Values(Fill::kNormal, kVocab * kH, 33)) table.push_back(ToBF16(x));
  Array<BF16> table_array(ops(), table);
  Array<int32_t> ids(ops(), {0, 49, ~0, ~2, 7});
  Array<int32_t> slots(ops(), {13, -5, 49});
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    RowsArray out(ops(), dtype, 5, kH);
    ops().Embed({.token_ids = ids.data(),
                 .slot_tokens = slots.data(),
                 .table = table_array.data(),
                 .vocab = kVocab,
                 .out = out.rows()});
    const std::vector<float> got = out.Get();
    const int64_t want[] = {0, 49, 13, 49, 7};
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t i = 0; i < kH; ++i) ASSERT_EQ(got[t * kH + i], ToFloat(table[want[t] * kH + i])) << t << ", " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, RowsTest, ::testing::ValuesIn(AllBackends()),
                         [](const auto& backend) { return backend.param.name; });

}  // namespace
}  // namespace nibble::testing
