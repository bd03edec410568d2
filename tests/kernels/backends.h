// Which backends the conformance tests run on, and memory on them with guard zones.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/ops.h"
#include "tests/kernels/cases.h"

namespace nibble::testing {

struct Backend {
  std::string name;
  std::shared_ptr<Ops> ops;  // null: why_not says what this machine lacks
  bool exact = true;         // equals the specification bit by bit also where sums may be taken in another order
  std::string why_not = {};

  friend void PrintTo(const Backend& backend, std::ostream* out) { *out << backend.name; }
};

// Every instruction set of this machine on one thread, the best one on three, and the GPU. The first is the
// specification.
inline const std::vector<Backend>& AllBackends() {
  static const std::vector<Backend>* backends = [] {
    auto* all = new std::vector<Backend>;
    for (Isa isa : AvailableIsas()) {
      all->push_back({KernelsFor(isa).name, CreateCpuOps({.threads = 1, .isa = isa})});
    }
    all->push_back({"threads3", CreateCpuOps({.threads = 3, .isa = std::nullopt})});
    auto cuda = CreateOps({.backend = "cuda"});
    Backend gpu = {.name = "cuda", .exact = false};
    if (cuda.ok()) {
      gpu.ops = *std::move(cuda);
    } else {
      gpu.why_not = cuda.status().ToString();
    }
    all->push_back(gpu);
    return all;
  }();
  return *backends;
}

// A test that runs on each of them.
class BackendTest : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (GetParam().ops == nullptr) GTEST_SKIP() << GetParam().why_not;
  }
  // A kernel that failed fails its test, not the next one.
  void TearDown() override {
    if (GetParam().ops == nullptr) return;
    const absl::Status status = ops().Synchronize();
    EXPECT_TRUE(status.ok()) << status;
  }
  Ops& ops() { return *GetParam().ops; }
  bool exact() const { return GetParam().exact; }
};

// An array on the device between two guard zones; poisoned unless given contents.
template <typename T>
class Array {
 public:
  Array(Ops& ops, std::vector<T> contents) : ops_(ops), count_(contents.size()) {
    std::vector<uint8_t> bytes(2 * kGuard + count_ * sizeof(T), kPoison);
    if (count_ != 0) std::memcpy(bytes.data() + kGuard, contents.data(), count_ * sizeof(T));
    Fill(bytes);
  }
  Array(Ops& ops, int64_t count) : ops_(ops), count_(count) {
    Fill(std::vector<uint8_t>(2 * kGuard + count_ * sizeof(T), kPoison));
  }

  T* data() const { return reinterpret_cast<T*>(buffer_.template as<uint8_t>() + kGuard); }
  std::vector<T> Get() const {
    std::vector<uint8_t> bytes(2 * kGuard + count_ * sizeof(T));
    ops_.Download(bytes.data(), buffer_.data(), bytes.size());
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(bytes[i], kPoison) << "written " << kGuard - i << " bytes before the array";
      EXPECT_EQ(bytes[bytes.size() - 1 - i], kPoison) << "written " << kGuard - i << " bytes past the array";
    }
    std::vector<T> result(count_);
    if (count_ != 0) std::memcpy(result.data(), bytes.data() + kGuard, count_ * sizeof(T));
    return result;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kPoison = 0xff;  // NaN in f32, bf16 and f16

  void Fill(const std::vector<uint8_t>& bytes) {
    auto buffer = ops_.Allocate(bytes.size());
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    buffer_ = *std::move(buffer);
    ops_.Upload(buffer_.data(), bytes.data(), bytes.size());
  }

  Ops& ops_;
  size_t count_;
  Buffer buffer_;
};

// f32 values as activations of either type.
class RowsArray {
 public:
  RowsArray(Ops& ops, DType dtype, int64_t rows, int64_t cols)
      : bytes_(ops, rows * cols * SizeOf(dtype)), rows_{bytes_.data(), dtype, rows, cols} {}
  RowsArray(Ops& ops, DType dtype, int64_t rows, int64_t cols, const std::vector<float>& values)
      : bytes_(ops, Encode(dtype, values)), rows_{bytes_.data(), dtype, rows, cols} {}

  const Rows& rows() const { return rows_; }
  std::vector<uint8_t> Bytes() const { return bytes_.Get(); }
  std::vector<float> Get() const {
    const std::vector<uint8_t> bytes = bytes_.Get();
    std::vector<float> values(rows_.rows * rows_.cols);
    for (size_t i = 0; i < values.size(); ++i) {
      if (rows_.dtype == DType::kF32) {
        std::memcpy(&values[i], &bytes[4 * i], 4);
      } else {
        BF16 half;
        std::memcpy(&half, &bytes[2 * i], 2);
        values[i] = ToFloat(half);
      }
    }
    return values;
  }

 private:
  static std::vector<uint8_t> Encode(DType dtype, const std::vector<float>& values) {
    std::vector<uint8_t> bytes(values.size() * SizeOf(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kF32) {
        std::memcpy(&bytes[4 * i], &values[i], 4);
      } else {
        const BF16 half = ToBF16(values[i]);
        std::memcpy(&bytes[2 * i], &half, 2);
      }
    }
    return bytes;
  }

  Array<uint8_t> bytes_;
  Rows rows_;
};

// The values a tensor of this type can hold.
inline std::vector<float> Rounded(DType dtype, std::vector<float> values) {
  if (dtype == DType::kBF16) {
    for (float& x : values) x = RoundToBF16(x);
  }
  return values;
}

inline std::vector<float> Values(Fill fill, int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal(random);
    switch (fill) {
      case Fill::kNormal:
        values[i] = x;
        break;
      case Fill::kOutliers:
        values[i] = i % 50 == 7 ? 100 * x : x;
        break;
      case Fill::kZeros:
        values[i] = 0;
        break;
      case Fill::kTiny:
        values[i] = x * 1e-40f;
        break;
      case Fill::kHuge:
        values[i] = x * 1e30f;
        break;
      case Fill::kConstant:
        values[i] = 3.25f;
        break;
    }
  }
  return values;
}

// Compares with a reference, each element within `absolute[i]`; reports the worst place as [row, col].
inline void ExpectClose(const std::vector<float>& got, const std::vector<double>& want,
                        const std::vector<double>& bound, int64_t cols, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double worst = 0;
  int64_t at = -1, wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - want[i]);
    const double excess = error <= bound[i] ? error / (bound[i] + 1e-300) : 1e300;
    if (!(error <= bound[i])) ++wrong;
    if (!(excess <= worst)) {
      worst = excess;
      at = static_cast<int64_t>(i);
    }
    if (std::isnan(got[i]) && at < 0) at = static_cast<int64_t>(i);
  }
  EXPECT_EQ(wrong, 0) << what << ": " << wrong << " of " << got.size() << " wrong, worst at [" << at / cols << ", "
                      << at % cols << "]: got " << got[at] << ", want " << want[at] << " ± " << bound[at];
}

// One step of rounding to the output's type.
inline double OutputUlp(DType dtype, double value) {
  return std::abs(value) * (dtype == DType::kBF16 ? 0x1p-8 : 0x1p-23) + 1e-44;
}

}  // namespace nibble::testing
