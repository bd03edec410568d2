#include "tools/quantize/rotation.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <utility>

#include "common/base/check.h"
#include "tools/quantize/linear_algebra.h"

namespace nibble {
namespace {

constexpr int kIterations = 24;  // of PrincipalBasis: what it has not separated by then has equal energy

constexpr int64_t kParallelWork = int64_t{1} << 18;  // multiply-adds below which waking threads costs more

std::vector<float> RandomSigns(int64_t k, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> signs;
  for (int64_t i = 0; i < k; ++i) signs.push_back((random() >> 63) != 0 ? 1.0f : -1.0f);
  return signs;
}

// x [rows, columns] to [columns, rows].
std::vector<float> Transposed(std::span<const float> x, int64_t rows, int64_t columns, ThreadPool* pool) {
  constexpr int64_t kTile = 32;
  std::vector<float> out(x.size());
  pool->ParallelFor((columns + kTile - 1) / kTile, [&](int64_t tile, int) {
    const int64_t first = tile * kTile, last = std::min(columns, first + kTile);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = first; c < last; ++c)
        out[static_cast<size_t>(c * rows + r)] = x[static_cast<size_t>(r * columns + c)];
    }
  });
  return out;
}

double Dot(const float* a, const float* b, int64_t n) {
  double partial[8] = {};  // independent sums in a fixed order, so that the loop vectorises
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) partial[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  double sum = 0;
  for (const double p : partial) sum += p;
  for (int64_t i = n / 8 * 8; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// Makes the rows of v [count, k] orthonormal: modified Gram-Schmidt, every row cleaned again when its turn comes, since
// the first time leaves a remainder of the order of rounding over what is left of it. A row in the span of those before
// it is drawn anew.
void Orthonormalize(std::span<float> v, int64_t k, std::mt19937_64* random, ThreadPool* pool) {
  const int64_t count = static_cast<int64_t>(v.size()) / k;
  const auto row = [&](int64_t i) { return v.data() + i * k; };
  const auto remove = [&](int64_t from, int64_t direction) {
    const float along = static_cast<float>(Dot(row(from), row(direction), k));
    for (int64_t c = 0; c < k; ++c) row(from)[c] -= along * row(direction)[c];
  };
  const auto clean = [&](int64_t i) {
    for (int64_t j = 0; j < i; ++j) remove(i, j);
    return std::sqrt(Dot(row(i), row(i), k));
  };
  for (int64_t i = 0; i < count; ++i) {
    const double before = std::sqrt(Dot(row(i), row(i), k));
    double norm = clean(i);
    if (!(norm > 1e-4 * before)) {
      for (int64_t c = 0; c < k; ++c) row(i)[c] = static_cast<float>((*random)() >> 40) * 0x1p-24f - 0.5f;
      clean(i);
      norm = clean(i);
    }
    for (int64_t c = 0; c < k; ++c) row(i)[c] = static_cast<float>(static_cast<double>(row(i)[c]) / norm);
    const int64_t later = count - i - 1;
    if (later * k < kParallelWork) {
      for (int64_t j = 0; j < later; ++j) remove(i + 1 + j, i);
    } else {
      pool->ParallelFor(later, [&](int64_t j, int) { remove(i + 1 + j, i); });
    }
  }
}

// x [rows, K] · matrix [K, K], K rows at a time: AccumulateProduct takes squares and sums over its arguments' rows.
void MultiplyRows(std::span<float> x, std::span<const float> matrix, int64_t k, ThreadPool* pool) {
  const int64_t rows = static_cast<int64_t>(x.size()) / k;
  std::vector<float> chunk(static_cast<size_t>(k * k)), product(chunk.size());
  for (int64_t begin = 0; begin < rows; begin += k) {
    const size_t taken = static_cast<size_t>(std::min(k, rows - begin) * k);
    float* const source = x.data() + begin * k;
    std::fill(std::copy(source, source + taken, chunk.begin()), chunk.end(), 0.0f);
    std::fill(product.begin(), product.end(), 0.0f);
    AccumulateProduct(Transposed(chunk, k, k, pool), matrix, k, product, pool);
    std::copy(product.begin(), product.begin() + static_cast<ptrdiff_t>(taken), source);
  }
}

}  // namespace

void HadamardBlocks(int64_t size, std::span<float> row) {
  const int64_t k = static_cast<int64_t>(row.size());
  NIBBLE_CHECK(size > 0 && (size & (size - 1)) == 0 && k % size == 0);
  for (int64_t distance = 1; distance < size; distance *= 2) {
    for (int64_t begin = 0; begin < k; begin += 2 * distance) {
      float* a = row.data() + begin;
      float* b = a + distance;
      for (int64_t i = 0; i < distance; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (float& x : row) x *= scale;
}

int64_t PowerOfTwoPart(int64_t n) { return n & -n; }

Rotation Rotation::Hadamard(int64_t k, uint64_t seed) {
  Rotation rotation;
  rotation.signs_ = RandomSigns(k, seed);
  rotation.parts_ = {k};
  return rotation;
}

Rotation Rotation::Principal(std::vector<float> basis, int64_t k, int64_t leading, uint64_t seed) {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(basis.size()), k * k);
  NIBBLE_CHECK(leading >= 0 && leading <= k);
  Rotation rotation;
  rotation.basis_ = std::move(basis);
  rotation.signs_ = RandomSigns(k, seed);
  for (const int64_t part : {leading, k - leading}) {
    if (part > 0) rotation.parts_.push_back(part);
  }
  return rotation;
}

void Rotation::Mix(std::span<float> row) const {
  for (size_t i = 0; i < row.size(); ++i) row[i] *= signs_[i];
  size_t begin = 0;
  for (const int64_t part : parts_) {
    const std::span<float> x = row.subspan(begin, static_cast<size_t>(part));
    begin += x.size();
    const int64_t size = PowerOfTwoPart(part), m = part / size;
    HadamardBlocks(size, x);
    if (m == 1) continue;
    // Hartley: cos + sin of 2πij/m, over sqrt(m); symmetric and its own inverse.
    std::vector<float> cas;
    for (int64_t i = 0; i < m; ++i) {
      const double angle = 2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(m);
      cas.push_back(static_cast<float>((std::cos(angle) + std::sin(angle)) / std::sqrt(static_cast<double>(m))));
    }
    std::vector<float> out(x.size(), 0.0f);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        const float factor = cas[static_cast<size_t>(i * j % m)];
        for (int64_t c = 0; c < size; ++c)
          out[static_cast<size_t>(i * size + c)] += factor * x[static_cast<size_t>(j * size + c)];
      }
    }
    std::copy(out.begin(), out.end(), x.begin());
  }
}

void Rotation::ApplyToRows(std::span<float> x, ThreadPool* pool) const {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(x.size()) % k(), 0);
  if (!basis_.empty()) MultiplyRows(x, basis_, k(), pool);
  pool->ParallelFor(static_cast<int64_t>(x.size()) / k(), [&](int64_t row, int) {
    Mix(x.subspan(static_cast<size_t>(row * k()), static_cast<size_t>(k())));
  });
}

void Rotation::ApplyToColumns(std::span<float> x, int64_t columns, ThreadPool* pool) const {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(x.size()), k() * columns);
  std::vector<float> rows = Transposed(x, k(), columns, pool);
  ApplyToRows(rows, pool);
  rows = Transposed(rows, columns, k(), pool);
  std::copy(rows.begin(), rows.end(), x.begin());
}

std::vector<float> PrincipalBasis(std::span<const float> moments, int64_t k, int64_t leading, uint64_t seed,
                                  ThreadPool* pool) {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(moments.size()), k * k);
  std::mt19937_64 random(seed);
  std::vector<float> v(static_cast<size_t>(k * k));  // rows are directions
  for (float& x : v) x = static_cast<float>(random() >> 40) * 0x1p-24f - 0.5f;
  const std::span<float> head = std::span(v).first(static_cast<size_t>(leading * k));
  for (int i = 0; i < kIterations && leading > 0; ++i) {
    Orthonormalize(head, k, &random, pool);
    MultiplyRows(head, moments, k, pool);
  }
  Orthonormalize(v, k, &random, pool);
  return Transposed(v, k, k, pool);
}

}  // namespace nibble
