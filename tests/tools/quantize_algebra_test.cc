#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tools/quantize/linear_algebra.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

std::vector<float> Draw(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(static_cast<float>(random() >> 40) * 0x1p-24f * 2 - 1);
  return out;
}

// aᵀ·a + 0.1 of a square a.
std::vector<double> Definite(size_t k) {
  const std::vector<float> a = Draw(static_cast<int64_t>(k * k), 3);
  std::vector<double> out(k * k, 0.0);
  for (size_t t = 0; t < k; ++t) {
    for (size_t i = 0; i < k; ++i) {
      for (size_t j = 0; j < k; ++j)
        out[i * k + j] += static_cast<double>(a[t * k + i]) * static_cast<double>(a[t * k + j]);
    }
  }
  for (size_t i = 0; i < k; ++i) out[i * k + i] += 0.1;
  return out;
}

TEST(AccumulateGram, AddsTheUpperTriangle) {
  constexpr size_t kK = 48, kRows = 600;  // rows are no multiple of a chunk
  const std::vector<float> x = Draw(kK * kRows, 1), y = Draw(kK * kRows, 2);
  ThreadPool one(1), three(3);
  std::vector<float> gram(kK * kK, 7.0f), again = gram, product(kK * kK, -1.0f);
  AccumulateGram(x, kK, gram, &one);
  AccumulateGram(x, kK, again, &three);
  AccumulateProduct(x, y, kK, product, &three);
  EXPECT_EQ(gram, again);
  for (size_t i = 0; i < kK; ++i) {
    for (size_t j = 0; j < kK; ++j) {
      double square = 7, cross = -1;
      for (size_t t = 0; t < kRows; ++t) {
        square += static_cast<double>(x[t * kK + i]) * static_cast<double>(x[t * kK + j]);
        cross += static_cast<double>(x[t * kK + i]) * static_cast<double>(y[t * kK + j]);
      }
      if (j >= i) {
        ASSERT_NEAR(gram[i * kK + j], square, 1e-3) << i << " " << j;
      }
      ASSERT_NEAR(product[i * kK + j], cross, 1e-3) << i << " " << j;
    }
  }
  MirrorUpper(kK, gram);
  EXPECT_EQ(gram[5 * kK + 2], gram[2 * kK + 5]);
}

TEST(UpperCholesky, FactorsFromTheLastRow) {
  constexpr size_t kK = 192;
  const std::vector<double> a = Definite(kK);
  std::vector<double> m = a, again = a;
  ThreadPool one(1), three(3);
  ASSERT_TRUE(UpperCholesky(kK, m, &one).ok());
  ASSERT_TRUE(UpperCholesky(kK, again, &three).ok());
  EXPECT_EQ(m, again);
  for (size_t i = 0; i < kK; ++i) {
    for (size_t j = 0; j < kK; ++j) {
      double sum = 0;
      for (size_t d = 0; d < kK; ++d) sum += m[i * kK + d] * m[j * kK + d];
      ASSERT_NEAR(sum, a[i * kK + j], 1e-9) << i << " " << j;
      if (j < i) {
        ASSERT_EQ(m[i * kK + j], 0);
      }
    }
  }
}

TEST(UpperCholesky, NamesThePivotThatFails) {
  constexpr size_t kK = 128;
  ThreadPool pool(1);
  for (const double bad : {0.0, -1.0, std::nan("")}) {
    std::vector<double> a(kK * kK, 0.0);
    for (size_t i = 0; i < kK; ++i) a[i * kK + i] = i == 17 ? bad : 1;
    const absl::Status status = UpperCholesky(kK, a, &pool);
    EXPECT_TRUE(absl::IsFailedPrecondition(status));
    EXPECT_THAT(status.message(), HasSubstr("pivot 17 of 128"));
  }
}

TEST(SolveRows, UndoesTheMatrix) {
  constexpr size_t kK = 64, kRows = 16;
  const std::vector<double> a = Definite(kK);
  std::vector<double> m = a;
  ThreadPool pool(2);
  ASSERT_TRUE(UpperCholesky(kK, m, &pool).ok());
  const std::vector<float> x = Draw(kK * kRows, 5);
  std::vector<double> b(kK * kRows, 0.0);
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = 0; i < kK; ++i) {
      for (size_t j = 0; j < kK; ++j) b[r * kK + j] += static_cast<double>(x[r * kK + i]) * a[i * kK + j];
    }
  }
  SolveRows(kK, m, b, &pool);
  for (size_t i = 0; i < b.size(); ++i) ASSERT_NEAR(b[i], x[i], 1e-8) << i;
}

}  // namespace
}  // namespace nibble
