#include "tools/quantize/linear_algebra.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "tools/quantize/tile_kernels.h"

namespace nibble {
namespace {

constexpr int64_t kChunkRows = 256;  // of two panels stay in the first-level cache
constexpr int64_t kPivotBlock = 64;

// Rows [begin, begin + rows) of x [.., K] into panels.
void PackPanels(std::span<const float> x, int64_t k, int64_t begin, int64_t rows, std::span<float> panels) {
  for (int64_t p = 0; p < k / kPanel; ++p) {
    for (int64_t t = 0; t < rows; ++t) {
      const float* from = x.data() + (begin + t) * k + p * kPanel;
      std::copy(from, from + kPanel, panels.data() + (p * rows + t) * kPanel);
    }
  }
}

void Accumulate(std::span<const float> x, std::span<const float> y, int64_t k, bool upper_only, std::span<float> out,
                ThreadPool* pool) {
  NIBBLE_CHECK(k > 0 && k % kPanel == 0);
  NIBBLE_CHECK_EQ(static_cast<int64_t>(x.size()) % k, 0);
  NIBBLE_CHECK_EQ(x.size(), y.size());
  NIBBLE_CHECK_EQ(static_cast<int64_t>(out.size()), k * k);
  const TileKernels& kernels = BestTileKernels();
  const int64_t total = static_cast<int64_t>(x.size()) / k, panels = k / kPanel;
  std::vector<float> a(static_cast<size_t>(kChunkRows * k)), b(upper_only ? 0 : a.size());
  for (int64_t begin = 0; begin < total; begin += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, total - begin);
    PackPanels(x, k, begin, rows, a);
    if (!upper_only) PackPanels(y, k, begin, rows, b);
    const std::vector<float>& right = upper_only ? a : b;
    pool->ParallelFor(panels, [&](int64_t i, int) {
      float tile[kPanel * kPanel];
      for (int64_t j = upper_only ? i : 0; j < panels; ++j) {
        kernels.product(a.data() + i * rows * kPanel, right.data() + j * rows * kPanel, rows, tile);
        for (int64_t r = 0; r < kPanel; ++r) {
          float* to = out.data() + (i * kPanel + r) * k + j * kPanel;
          for (int64_t c = 0; c < kPanel; ++c) to[c] += tile[r * kPanel + c];
        }
      }
    });
  }
}

}  // namespace

void AccumulateGram(std::span<const float> x, int64_t k, std::span<float> gram, ThreadPool* pool) {
  Accumulate(x, x, k, /*upper_only=*/true, gram, pool);
}

void AccumulateProduct(std::span<const float> x, std::span<const float> y, int64_t k, std::span<float> product,
                       ThreadPool* pool) {
  Accumulate(x, y, k, /*upper_only=*/false, product, pool);
}

void MirrorUpper(int64_t k, std::span<float> matrix) {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(matrix.size()), k * k);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < i; ++j) matrix[static_cast<size_t>(i * k + j)] = matrix[static_cast<size_t>(j * k + i)];
  }
}

absl::Status UpperCholesky(int64_t k, std::span<double> a, ThreadPool* pool) {
  NIBBLE_CHECK(k > 0 && k % kPivotBlock == 0);
  NIBBLE_CHECK_EQ(static_cast<int64_t>(a.size()), k * k);
  const TileKernels& kernels = BestTileKernels();
  std::vector<double> panels(static_cast<size_t>(k * kPivotBlock));  // [k/8][64][8] of the block's columns, transposed
  for (int64_t begin = k - kPivotBlock; begin >= 0; begin -= kPivotBlock) {
    const auto at = [&](int64_t i, int64_t j) -> double& { return a[static_cast<size_t>(i * k + j)]; };
    for (int64_t c = begin + kPivotBlock - 1; c >= begin; --c) {
      for (int64_t d = c + 1; d < begin + kPivotBlock; ++d) at(c, c) -= at(c, d) * at(c, d);
      if (!(at(c, c) > 0) || !std::isfinite(at(c, c))) {
        return absl::FailedPreconditionError(
            absl::StrCat("the Hessian is not positive definite: pivot ", c, " of ", k, " is ", at(c, c)));
      }
      at(c, c) = std::sqrt(at(c, c));
      for (int64_t r = begin; r < c; ++r) {
        for (int64_t d = c + 1; d < begin + kPivotBlock; ++d) at(r, c) -= at(r, d) * at(c, d);
        at(r, c) /= at(c, c);
      }
    }
    const int64_t above = begin / kPanelF64;
    pool->ParallelFor(above, [&](int64_t p, int) {  // eight rows above the block: m = a · (block's m)⁻ᵀ
      double* const panel = panels.data() + p * kPivotBlock * kPanelF64;
      for (int64_t c = kPivotBlock - 1; c >= 0; --c) {
        double sum[kPanelF64];
        for (int64_t r = 0; r < kPanelF64; ++r) sum[r] = at(p * kPanelF64 + r, begin + c);
        for (int64_t d = c + 1; d < kPivotBlock; ++d) {
          const double m = at(begin + c, begin + d);
          for (int64_t r = 0; r < kPanelF64; ++r) sum[r] -= panel[d * kPanelF64 + r] * m;
        }
        for (int64_t r = 0; r < kPanelF64; ++r) panel[c * kPanelF64 + r] = sum[r] / at(begin + c, begin + c);
      }
      for (int64_t c = 0; c < kPivotBlock; ++c) {
        for (int64_t r = 0; r < kPanelF64; ++r) at(p * kPanelF64 + r, begin + c) = panel[c * kPanelF64 + r];
      }
    });
    pool->ParallelFor(above, [&](int64_t i, int) {
      double tile[kPanelF64 * kPanelF64];
      for (int64_t j = i; j < above; ++j) {
        const int64_t panel = kPivotBlock * kPanelF64;
        kernels.product_f64(panels.data() + i * panel, panels.data() + j * panel, kPivotBlock, tile);
        for (int64_t r = 0; r < kPanelF64; ++r) {
          for (int64_t c = 0; c < kPanelF64; ++c) at(i * kPanelF64 + r, j * kPanelF64 + c) -= tile[r * kPanelF64 + c];
        }
      }
    });
  }
  for (int64_t i = 0; i < k; ++i) std::fill_n(a.begin() + static_cast<ptrdiff_t>(i * k), i, 0.0);
  return absl::OkStatus();
}

void SolveRows(int64_t k, std::span<const double> m, std::span<double> b, ThreadPool* pool) {
  NIBBLE_CHECK_EQ(static_cast<int64_t>(m.size()), k * k);
  NIBBLE_CHECK_EQ(static_cast<int64_t>(b.size()) % (k * kPanelF64), 0);
  const int64_t tiles = static_cast<int64_t>(b.size()) / (k * kPanelF64);
  pool->ParallelFor(tiles, [&](int64_t tile, int) {  // eight rows at a time
    double* const rows = b.data() + tile * kPanelF64 * k;
    std::vector<double> x(static_cast<size_t>(k * kPanelF64));
    for (int64_t r = 0; r < kPanelF64; ++r) {
      for (int64_t c = 0; c < k; ++c) x[static_cast<size_t>(c * kPanelF64 + r)] = rows[r * k + c];
    }
    const auto lanes = [&](int64_t c) { return x.data() + c * kPanelF64; };
    for (int64_t c = k - 1; c >= 0; --c) {  // y·mᵀ = b
      double* const y = lanes(c);
      for (int64_t d = c + 1; d < k; ++d) {
        for (int64_t r = 0; r < kPanelF64; ++r) y[r] -= lanes(d)[r] * m[static_cast<size_t>(c * k + d)];
      }
      for (int64_t r = 0; r < kPanelF64; ++r) y[r] /= m[static_cast<size_t>(c * k + c)];
    }
    for (int64_t c = 0; c < k; ++c) {  // x·m = y
      double* const y = lanes(c);
      for (int64_t r = 0; r < kPanelF64; ++r) y[r] /= m[static_cast<size_t>(c * k + c)];
      for (int64_t d = c + 1; d < k; ++d) {
        for (int64_t r = 0; r < kPanelF64; ++r) lanes(d)[r] -= y[r] * m[static_cast<size_t>(c * k + d)];
      }
    }
    for (int64_t r = 0; r < kPanelF64; ++r) {
      for (int64_t c = 0; c < k; ++c) rows[r * k + c] = x[static_cast<size_t>(c * kPanelF64 + r)];
    }
  });
}

}  // namespace nibble
