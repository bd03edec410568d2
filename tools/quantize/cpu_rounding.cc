#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/base/thread_pool.h"
#include "tools/quantize/gptq.h"
#include "tools/quantize/linear_algebra.h"
#include "tools/quantize/rounding_order.h"
#include "tools/quantize/tile_kernels.h"

namespace nibble {
namespace {

constexpr int kDampingTries = 4;

size_t Square(int64_t k) { return static_cast<size_t>(k * k); }

class CpuMoments : public InputMoments {
 public:
  CpuMoments(int64_t k, bool with_coding_error) : k_(k), gram(Square(k)), cross(with_coding_error ? Square(k) : 0) {}

  int64_t k() const override { return k_; }
  int64_t rows() const override { return rows_seen; }
  absl::StatusOr<std::vector<float>> Hessian() const override {
    std::vector<float> full = gram;
    MirrorUpper(k_, full);
    return full;
  }
  absl::StatusOr<std::vector<float>> MeanSquare() const override {
    std::vector<float> mean = Diagonal();
    for (float& x : mean) x /= static_cast<float>(std::max<int64_t>(1, rows_seen));
    return mean;
  }
  std::vector<float> Diagonal() const {
    std::vector<float> diagonal(static_cast<size_t>(k_));
    for (size_t i = 0; i < diagonal.size(); ++i) diagonal[i] = gram[i * diagonal.size() + i];
    return diagonal;
  }

 private:
  const int64_t k_;

 public:
  std::vector<float> gram;   // [K, K] upper triangle of Σ x·xᵀ, of the coded rows where they were given
  std::vector<float> cross;  // [K, K] Σ (x − coded)·codedᵀ, or empty
  int64_t rows_seen = 0;
};

// Everything in rounding order.
struct CpuFactor : public RoundingFactor {
  ColumnOrder order;
  std::vector<float> hessian;        // panels [K/16][K][16], damped
  std::vector<float> feedback;       // panels of m_ij / m_jj, or empty
  std::vector<float> correction;     // panels of C·H⁻¹, or empty: W + W·correction replaces W
  std::vector<float> column_weight;  // [K] m_jj², or H_jj without feedback
  double damping = 0;                // relative
  double ridge = 0;                  // what was added to the diagonal
  int64_t dead_columns = 0;
  std::string fallback;
};

// value(i, j) for every element into panels [K/16][K][16].
template <typename Value>
std::vector<float> MakePanels(int64_t k, ThreadPool* pool, const Value& value) {
  std::vector<float> panels(Square(k));
  pool->ParallelFor(k / kPanel, [&](int64_t p, int) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < kPanel; ++j) {
        panels[static_cast<size_t>((p * k + i) * kPanel + j)] = static_cast<float>(value(i, p * kPanel + j));
      }
    }
  });
  return panels;
}

class CpuRoundingDevice : public RoundingDevice {
 public:
  explicit CpuRoundingDevice(int threads) : pool_(threads) {}

  std::string Describe() const override { return absl::StrCat("cpu, ", pool_.threads(), " threads"); }

  absl::StatusOr<std::unique_ptr<InputMoments>> CreateMoments(int64_t k, bool with_coding_error) override {
    if (k <= 0 || k % kBlock != 0) {
      return absl::InvalidArgumentError(absl::StrCat("input has ", k, " channels, must be a multiple of ", kBlock));
    }
    return std::make_unique<CpuMoments>(k, with_coding_error);
  }

  absl::Status Accumulate(std::span<const float> x, InputMoments* moments) override {
    CpuMoments& to = static_cast<CpuMoments&>(*moments);
    NIBBLE_CHECK(to.cross.empty());
    AccumulateGram(x, to.k(), to.gram, &pool_);
    to.rows_seen += static_cast<int64_t>(x.size()) / to.k();
    return absl::OkStatus();
  }

  absl::Status Accumulate(std::span<const float> x, std::span<const float> coded, InputMoments* moments) override {
    CpuMoments& to = static_cast<CpuMoments&>(*moments);
    NIBBLE_CHECK(!to.cross.empty());
    NIBBLE_CHECK_EQ(x.size(), coded.size());
    std::vector<float> lost(x.size());
    std::transform(x.begin(), x.end(), coded.begin(), lost.begin(), std::minus<>());
    AccumulateGram(coded, to.k(), to.gram, &pool_);
    AccumulateProduct(lost, coded, to.k(), to.cross, &pool_);
    to.rows_seen += static_cast<int64_t>(x.size()) / to.k();
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<RoundingFactor>> Factorize(const InputMoments& moments, const InputPlan& plan,
                                                            const GptqOptions& options) override {
    const CpuMoments& from = static_cast<const CpuMoments&>(moments);
    const int64_t k = from.k();
    auto factor = std::make_unique<CpuFactor>();
    const std::vector<float> diagonal = from.Diagonal();
    factor->order = OrderColumns(diagonal, plan, options.order);
    factor->dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0f);
    double mean = 0;
    for (const float x : diagonal) mean += static_cast<double>(x) / static_cast<double>(k);

    const auto place = [&](int64_t i) { return static_cast<int64_t>(factor->order.channel[static_cast<size_t>(i)]); };
    const auto entry = [&](int64_t i, int64_t j) {
      const int64_t a = place(i), b = place(j);
      return static_cast<double>(from.gram[static_cast<size_t>(std::min(a, b) * k + std::max(a, b))]);
    };
    std::vector<double> m;
    absl::Status factored = absl::FailedPreconditionError("not asked for");
    if (options.compensate || !from.cross.empty()) {
      double damping = options.damping;
      for (int tries = 0; tries < kDampingTries && !factored.ok(); ++tries, damping *= 10) {
        factor->damping = damping;
        factor->ridge = damping * mean;
        m.resize(Square(k));
        pool_.ParallelFor(k, [&](int64_t i, int) {
          for (int64_t j = i; j < k; ++j)
            m[static_cast<size_t>(i * k + j)] = entry(i, j) + (i == j ? factor->ridge : 0.0);
        });
        factored = UpperCholesky(k, m, &pool_);
      }
      if (!factored.ok()) factor->fallback = std::string(factored.message());
    }
    factor->hessian =
        MakePanels(k, &pool_, [&](int64_t i, int64_t j) { return entry(i, j) + (i == j ? factor->ridge : 0); });

    const auto at = [&](int64_t i, int64_t j) { return m[static_cast<size_t>(i * k + j)]; };
    const bool feedback = options.compensate && factored.ok();
    for (int64_t j = 0; j < k; ++j) {
      const double weight = feedback ? at(j, j) * at(j, j) : entry(j, j) + factor->ridge;
      factor->column_weight.push_back(std::isfinite(weight) ? static_cast<float>(weight) : 0.0f);
    }
    if (feedback) {
      factor->feedback = MakePanels(k, &pool_, [&](int64_t i, int64_t j) { return i < j ? at(i, j) / at(j, j) : 0.0; });
    }
    if (!from.cross.empty() && factored.ok()) {
      std::vector<double> solution(Square(k));
      pool_.ParallelFor(k, [&](int64_t i, int) {
        for (int64_t j = 0; j < k; ++j) {
          solution[static_cast<size_t>(i * k + j)] =
              static_cast<double>(from.cross[static_cast<size_t>(place(i) * k + place(j))]);
        }
      });
      SolveRows(k, m, solution, &pool_);
      factor->correction =
          MakePanels(k, &pool_, [&](int64_t i, int64_t j) { return solution[static_cast<size_t>(i * k + j)]; });
    }
    return factor;
  }

  absl::StatusOr<RoundedLinear> Round(const DenseLinear& linear, const InputPlan& plan, const InputMoments& moments,
                                      const RoundingFactor& factor_base, const GptqOptions& options) override {
    const CpuFactor& factor = static_cast<const CpuFactor&>(factor_base);
    const int64_t n = linear.shape.n, k = linear.shape.k, groups = k / kBlock;
    NIBBLE_CHECK_EQ(k, moments.k());
    NIBBLE_CHECK(!options.row_clips.empty());
    RoundedLinear out{.tensors = EmptyTensors(linear.shape, plan), .report = {}};
    out.tensors.bias = linear.bias;
    out.report.damping = factor.damping;
    out.report.dead_columns = factor.dead_columns;
    out.report.fallback = factor.fallback;

    const TileKernels& kernels = BestTileKernels();
    const size_t lanes = static_cast<size_t>(k * kPanel);
    struct Scratch {
      std::vector<float> weight, error, group_scale, group_min, work;
      std::vector<uint8_t> codes;
    };
    std::vector<Scratch> scratch(static_cast<size_t>(pool_.threads()));
    const int64_t tiles = (n + kPanel - 1) / kPanel;
    std::vector<double> errors(static_cast<size_t>(tiles)), energies(static_cast<size_t>(tiles));
    pool_.ParallelFor(tiles, [&](int64_t tile, int thread) {
      Scratch& s = scratch[static_cast<size_t>(thread)];
      s.weight.assign(lanes, 0.0f);
      s.error.resize(lanes);
      s.codes.resize(lanes);
      s.work.resize(static_cast<size_t>(TileScratchFloats(k)));
      s.group_scale.resize(static_cast<size_t>(groups * kPanel));
      s.group_min.resize(static_cast<size_t>(groups * kPanel));
      float channel_scale[kPanel];
      const int64_t rows = std::min(kPanel, n - tile * kPanel);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = linear.weight.data() + (tile * kPanel + r) * k;
        for (size_t i = 0; i < static_cast<size_t>(k); ++i) {
          s.weight[i * kPanel + static_cast<size_t>(r)] = row[factor.order.channel[i]];
        }
      }
      if (!factor.correction.empty()) {
        s.error = s.weight;
        for (int64_t p = 0; p < k; p += kPanel) {
          float block[kPanel * kPanel];
          kernels.product(factor.correction.data() + p * k, s.error.data(), k, block);
          for (int64_t i = 0; i < kPanel * kPanel; ++i) s.weight[static_cast<size_t>(p * kPanel + i)] += block[i];
        }
      }
      kernels.round({.k = k,
                     .weight = s.weight.data(),
                     .group_of = factor.order.group.data(),
                     .groups_in_turn = factor.order.groups_in_turn,
                     .feedback = factor.feedback.empty() ? nullptr : factor.feedback.data(),
                     .column_weight = factor.column_weight.data(),
                     .hessian = factor.hessian.data(),
                     .clips = options.row_clips.data(),
                     .num_clips = static_cast<int64_t>(options.row_clips.size()),
                     .search_groups = options.search_groups,
                     .refinements = factor.feedback.empty() ? 0 : options.refinements},
                    s.work.data(),
                    {.codes = s.codes.data(),
                     .group_scale = s.group_scale.data(),
                     .group_min = s.group_min.data(),
                     .channel_scale = channel_scale,
                     .error = s.error.data()});
      errors[static_cast<size_t>(tile)] = Energy(kernels, factor, s.error);
      energies[static_cast<size_t>(tile)] = Energy(kernels, factor, s.weight);
      for (int64_t r = 0; r < rows; ++r) {
        const size_t row = static_cast<size_t>(tile * kPanel + r), lane = static_cast<size_t>(r);
        for (size_t i = 0; i < static_cast<size_t>(k); ++i) {
          const size_t code = static_cast<size_t>(factor.order.code[i]);
          out.tensors.qweight[(row * static_cast<size_t>(k) + code) / 2] |=
              static_cast<uint8_t>(s.codes[i * kPanel + lane] << (code % 2 * 4));
        }
        for (size_t g = 0; g < static_cast<size_t>(groups); ++g) {
          const size_t to = row * static_cast<size_t>(groups) + g;
          out.tensors.group_scale[to] = static_cast<uint8_t>(s.group_scale[g * kPanel + lane]);
          out.tensors.group_min[to] = static_cast<int8_t>(s.group_min[g * kPanel + lane]);
        }
        out.tensors.channel_scale[row] = channel_scale[r];
      }
    });
    for (const double error : errors) out.report.output_error += error;
    for (const double energy : energies) out.report.output_energy += energy;
    return out;
  }

 private:
  // Σ over lanes of v·H·vᵀ for v [K][16] in rounding order, H without what damping added.
  static double Energy(const TileKernels& kernels, const CpuFactor& factor, const std::vector<float>& v) {
    const int64_t k = static_cast<int64_t>(v.size()) / kPanel;
    double energy = 0;
    float block[kPanel * kPanel];
    for (int64_t p = 0; p < k; p += kPanel) {
      kernels.product(factor.hessian.data() + p * k, v.data(), k, block);
      for (int64_t i = 0; i < kPanel * kPanel; ++i) {
        const double x = static_cast<double>(v[static_cast<size_t>(p * kPanel + i)]);
        energy += x * (static_cast<double>(block[i]) - factor.ridge * x);
      }
    }
    return energy;
  }

  ThreadPool pool_;
};

}  // namespace

std::unique_ptr<RoundingDevice> CreateCpuRoundingDevice(int threads) {
  return std::make_unique<CpuRoundingDevice>(threads);
}

}  // namespace nibble
