// Compiled once per instruction set by tile_kernels.cc, which defines NIBBLE_ISA. Vectors are GCC's: eight floats or
// four doubles, in one register or in several.
#include "tools/quantize/tile_kernels.h"

namespace nibble::NIBBLE_ISA {

constexpr int64_t kGroup = 128;
constexpr float kMaxLevel = 119;  // of |Q8|: 119 + 7 of a group's rounded range stays in int8

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
};
using Vec = VectorOf<float>::Type;

inline Vec Set(float x) { return Vec{} + x; }
inline Vec Min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }
// Round to nearest even for |x| < 2^22.
inline Vec RoundNear(Vec x) {
  const Vec magic = Set(12582912.0f);  // 1.5 · 2^23
  return (x + magic) - magic;
}
inline Vec Abs(Vec x) { return Max(x, -x); }

template <typename T>
void Product(const T* a, const T* b, int64_t rows, T* out) {
  using V = typename VectorOf<T>::Type;
  constexpr int kLanes = 32 / sizeof(T), kWidth = 2 * kLanes, kRows = 4;
  for (int i = 0; i < kWidth; i += kRows) {
    V low[kRows] = {}, high[kRows] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const V* row = reinterpret_cast<const V*>(b + t * kWidth);
      const V b_low = row[0], b_high = row[1];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const T x = a[t * kWidth + i + r];
        low[r] += x * b_low;
        high[r] += x * b_high;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      reinterpret_cast<V*>(out + (i + r) * kWidth)[0] = low[r];
      reinterpret_cast<V*>(out + (i + r) * kWidth)[1] = high[r];
    }
  }
}

// A tile in two vectors of lanes.
struct Lanes {
  Vec half[2];
};
inline Lanes* AsLanes(float* p) { return reinterpret_cast<Lanes*>(p); }
inline const Lanes* AsLanes(const float* p) { return reinterpret_cast<const Lanes*>(p); }

inline Vec Code(Vec level, Vec min, Vec inverse_scale) {
  return Min(Max(RoundNear((level - min) * inverse_scale), Set(0)), Set(15));
}

// The scale and minimum of one group for which Σ weight (value − target)² is least. target [128][16] in weights.
inline void SearchGroup(const Lanes* target, const float* weight, const Lanes& inverse_step, bool search, Lanes* scale,
                        Lanes* min) {
  for (int h = 0; h < 2; ++h) {
    Vec level[kGroup], high = Set(-kMaxLevel), low = Set(kMaxLevel);
    for (int64_t i = 0; i < kGroup; ++i) {
      level[i] = target[i].half[h] * inverse_step.half[h];
      // Compensation may carry a target beyond every level: bounded, so that rounding stays exact.
      level[i] = Min(Max(level[i], Set(-1024)), Set(1024));
      const Vec clipped = Min(Max(RoundNear(level[i]), Set(-kMaxLevel)), Set(kMaxLevel));
      high = Max(high, clipped);
      low = Min(low, clipped);
    }
    const Vec nearest = Max(Set(1), RoundNear((high - low) / Set(15)));
    Vec best_error = Set(0);
    const int steps = search ? 4 : 1, shifts = search ? 5 : 1;
    for (int step = 0; step < steps; ++step) {
      const Vec s = Max(Set(1), nearest - Set(static_cast<float>(step))), inverse = Set(1) / s;
      for (int shift = 0; shift < shifts; ++shift) {
        Vec m = RoundNear(low + ((high - low) - Set(15) * s) * Set(0.25f * static_cast<float>(shift)));
        m = Min(Min(Max(m, Set(-kMaxLevel)), Set(kMaxLevel)), Set(127) - Set(15) * s);
        Vec error = Set(0);
        for (int64_t i = 0; i < kGroup; ++i) {
          const Vec difference = Code(level[i], m, inverse) * s + m - level[i];
          error += difference * difference * weight[i];
        }
        if (step == 0 && shift == 0) {
          best_error = error, scale->half[h] = s, min->half[h] = m;
        } else {
          const auto better = error < best_error;
          scale->half[h] = better ? s : scale->half[h];
          min->half[h] = better ? m : min->half[h];
          best_error = better ? error : best_error;
        }
      }
    }
  }
}

// Rounds every column with the row scales `step`; returns Σ column_weight (target − ŵ)² per lane.
inline Lanes Sweep(const TileProblem& p, const Lanes& step, Lanes* target, Lanes* block, Lanes* error, Lanes* codes,
                   Lanes* scale, Lanes* min) {
  const Lanes* weight = AsLanes(p.weight);
  Lanes inverse_step, loss{};
  for (int h = 0; h < 2; ++h) inverse_step.half[h] = Set(1) / step.half[h];
  if (!p.groups_in_turn) {
    for (int64_t g = 0; g < p.k / kGroup; ++g) {
      float group_weight[kGroup];
      int64_t found = 0;
      for (int64_t j = 0; j < p.k && found < kGroup; ++j) {
        if (p.group_of[j] != g) continue;
        target[found] = weight[j];
        group_weight[found++] = p.column_weight[j];
      }
      SearchGroup(target, group_weight, inverse_step, p.search_groups, &scale[g], &min[g]);
    }
  }
  for (int64_t begin = 0; begin < p.k; begin += kGroup) {
    for (int64_t sub = 0; sub < kGroup; sub += kPanel) {
      for (int64_t j = 0; j < kPanel; ++j) target[sub + j] = weight[begin + sub + j];
      if (p.feedback == nullptr || begin == 0) continue;
      Product(p.feedback + (begin + sub) * p.k, &error[0].half[0][0], begin, &block[0].half[0][0]);
      for (int64_t j = 0; j < kPanel; ++j) {
        for (int h = 0; h < 2; ++h) target[sub + j].half[h] += block[j].half[h];
      }
    }
    if (p.groups_in_turn) {
      const int32_t g = p.group_of[begin];
      SearchGroup(target, p.column_weight + begin, inverse_step, p.search_groups, &scale[g], &min[g]);
    }
    for (int64_t sub = 0; sub < kGroup; sub += kPanel) {
      const float* panel = p.feedback == nullptr ? nullptr : p.feedback + (begin + sub) * p.k;  // [K][16]
      if (panel != nullptr && sub > 0) {
        Product(panel + begin * kPanel, &error[begin].half[0][0], sub, &block[0].half[0][0]);
        for (int64_t j = 0; j < kPanel; ++j) {
          for (int h = 0; h < 2; ++h) target[sub + j].half[h] += block[j].half[h];
        }
      }
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t column = begin + sub + j;
        const int32_t g = p.group_of[column];
        for (int h = 0; h < 2; ++h) {
          Vec t = target[sub + j].half[h];
          if (panel != nullptr) {
            for (int64_t i = 0; i < j; ++i) {
              t += error[begin + sub + i].half[h] * panel[(begin + sub + i) * kPanel + j];
            }
          }
          const Vec s = scale[g].half[h], m = min[g].half[h];
          const Vec level = Min(Max(t * inverse_step.half[h], Set(-1024)), Set(1024));
          const Vec code = Code(level, m, Set(1) / s);
          const Vec value = (code * s + m) * step.half[h];
          codes[column].half[h] = code;
          error[column].half[h] = weight[column].half[h] - value;
          loss.half[h] += (t - value) * (t - value) * p.column_weight[column];
        }
      }
    }
  }
  return loss;
}

// Coordinate descent on d·H·dᵀ, then the row scale's least squares value, problem.refinements times.
inline void Refine(const TileProblem& p, Lanes* block, Lanes* error, Lanes* codes, const Lanes* scale, const Lanes* min,
                   Lanes* step) {
  const Lanes* weight = AsLanes(p.weight);
  for (int round = 0; round < p.refinements; ++round) {
    for (int64_t begin = 0; begin < p.k; begin += kPanel) {
      const float* panel = p.hessian + begin * p.k;  // [K][16]
      Product(panel, &error[0].half[0][0], p.k, &block[0].half[0][0]);
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t column = begin + j;
        const int32_t g = p.group_of[column];
        for (int h = 0; h < 2; ++h) {
          const Vec s = scale[g].half[h], m = min[g].half[h], value = weight[column].half[h] - error[column].half[h];
          const Vec best = value + block[j].half[h] / Set(panel[column * kPanel + j]);
          const Vec level = Min(Max(best / step->half[h], Set(-1024)), Set(1024));
          const Vec code = Code(level, m, Set(1) / s), moved = (code * s + m) * step->half[h];
          const Vec change = moved - value;
          codes[column].half[h] = code;
          error[column].half[h] = weight[column].half[h] - moved;
          for (int64_t i = j + 1; i < kPanel; ++i) block[i].half[h] -= change * panel[column * kPanel + i];
        }
      }
    }
    // s' minimises (w − s'·v)·H·(w − s'·v)ᵀ for ŵ = s·v: s' = s · (1 + d·H·ŵᵀ / ŵ·H·ŵᵀ).
    Lanes along{}, energy{};
    for (int64_t i = 0; i < p.k; ++i) {
      for (int h = 0; h < 2; ++h) error[i].half[h] = weight[i].half[h] - error[i].half[h];  // holds ŵ for a while
    }
    for (int64_t begin = 0; begin < p.k; begin += kPanel) {
      Product(p.hessian + begin * p.k, &error[0].half[0][0], p.k, &block[0].half[0][0]);
      for (int64_t j = 0; j < kPanel; ++j) {
        for (int h = 0; h < 2; ++h) {
          const Vec value = error[begin + j].half[h];
          energy.half[h] += block[j].half[h] * value;
          along.half[h] += block[j].half[h] * (weight[begin + j].half[h] - value);
        }
      }
    }
    for (int h = 0; h < 2; ++h) {
      Vec factor = Set(1) + along.half[h] / energy.half[h];
      factor = energy.half[h] > Set(0) ? factor : Set(1);
      factor = Min(Max(factor, Set(0.5f)), Set(2));
      step->half[h] *= factor;
      for (int64_t i = 0; i < p.k; ++i) error[i].half[h] = weight[i].half[h] - error[i].half[h] * factor;
    }
  }
}

void Round(const TileProblem& p, float* scratch, const TileResult& out) {
  Lanes* const target = AsLanes(scratch);   // [128]
  Lanes* const block = target + kGroup;     // [16]
  Lanes* const error = block + kPanel;      // [K]
  Lanes* const codes = error + p.k;         // [K]
  Lanes* const best_codes = codes + p.k;    // [K]
  Lanes* const scale = best_codes + p.k;    // [K/128]
  Lanes* const min = scale + p.k / kGroup;  // [K/128]
  Lanes* const best_scale = AsLanes(out.group_scale);
  Lanes* const best_min = AsLanes(out.group_min);
  Lanes* const best_error = AsLanes(out.error);
  Lanes* const best_step = AsLanes(out.channel_scale);
  const Lanes* weight = AsLanes(p.weight);

  Lanes largest{}, best_loss{};
  for (int64_t i = 0; i < p.k; ++i) {
    for (int h = 0; h < 2; ++h) largest.half[h] = Max(largest.half[h], Abs(weight[i].half[h]));
  }
  // Below, 1/scale would overflow; such a row is zero to any precision that matters.
  for (int h = 0; h < 2; ++h) largest.half[h] = largest.half[h] > Set(1e-30f) ? largest.half[h] : Set(0);
  for (int64_t c = 0; c < p.num_clips; ++c) {
    Lanes step;
    for (int h = 0; h < 2; ++h) {
      step.half[h] = largest.half[h] > Set(0) ? largest.half[h] * Set(p.clips[c] / kMaxLevel) : Set(1);
    }
    const Lanes loss = Sweep(p, step, target, block, error, codes, scale, min);
    for (int h = 0; h < 2; ++h) {
      const auto better = c == 0 ? Set(0) == Set(0) : loss.half[h] < best_loss.half[h];
      const auto take = [&](Vec* to, Vec from) { *to = better ? from : *to; };
      best_loss.half[h] = c == 0 ? loss.half[h] : Min(loss.half[h], best_loss.half[h]);
      take(&best_step->half[h], step.half[h]);
      for (int64_t i = 0; i < p.k; ++i) {
        take(&best_codes[i].half[h], codes[i].half[h]);
        take(&best_error[i].half[h], error[i].half[h]);
      }
      for (int64_t g = 0; g < p.k / kGroup; ++g) {
        take(&best_scale[g].half[h], scale[g].half[h]);
        take(&best_min[g].half[h], min[g].half[h]);
      }
    }
  }
  if (p.refinements > 0) Refine(p, block, best_error, best_codes, best_scale, best_min, best_step);
  // A row of zeros: scale 0, as the format has it.
  for (int h = 0; h < 2; ++h) best_step->half[h] = largest.half[h] > Set(0) ? best_step->half[h] : Set(0);
  for (int64_t i = 0; i < p.k; ++i) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      out.codes[i * kPanel + lane] = static_cast<uint8_t>(best_codes[i].half[lane / 8][lane % 8]);
    }
    for (int h = 0; h < 2; ++h) best_error[i].half[h] = largest.half[h] > Set(0) ? best_error[i].half[h] : Set(0);
  }
}

extern const TileKernels kTileKernels;
const TileKernels kTileKernels = {.product = Product<float>, .product_f64 = Product<double>, .round = Round};

}  // namespace nibble::NIBBLE_ISA
