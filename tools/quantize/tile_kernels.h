// The inner loops of the quantizer, compiled once per instruction set and chosen from CPUID when they are first used.
// Products and sums are separate operations in one order, so both instruction sets give the same bits.
#pragma once

#include <cstdint>

namespace nibble {

// A matrix [rows, K] in panels is [K/16][rows][16] (f64: [K/8][rows][8]), so that products stream through memory.
inline constexpr int64_t kPanel = 16;  // also the rows of a linear that are coded together
inline constexpr int64_t kPanelF64 = 8;

// Sixteen rows of a linear (lanes), its columns in rounding order. Arrays of lanes are [..][16].
struct TileProblem {
  int64_t k = 0;
  const float* weight = nullptr;         // [K][16] what to approach
  const int32_t* group_of = nullptr;     // [K] group of the column at each place of the order
  bool groups_in_turn = true;            // a group's 128 columns stand together: its scale is searched when it comes up
  const float* feedback = nullptr;       // panels of m_ij / m_jj [K, K] (gptq.h), or null: rounding to nearest
  const float* column_weight = nullptr;  // [K] of a column's squared error
  const float* hessian = nullptr;        // panels of H [K, K], damped; used by refinements
  const float* clips = nullptr;          // [num_clips] candidates for s_w
  int64_t num_clips = 0;
  bool search_groups = true;
  int refinements = 0;
};

struct TileResult {
  uint8_t* codes = nullptr;        // [K][16]
  float* group_scale = nullptr;    // [K/128][16] 1..16
  float* group_min = nullptr;      // [K/128][16]
  float* channel_scale = nullptr;  // [16]
  float* error = nullptr;          // [K][16] w − ŵ
};

struct TileKernels {
  // out [16, 16] = Σ_t a[t]ᵀ·b[t] over panels a, b [rows][16]; f64: [8, 8] over panels [rows][8].
  void (*product)(const float* a, const float* b, int64_t rows, float* out);
  void (*product_f64)(const double* a, const double* b, int64_t rows, double* out);
  // scratch: TileScratchFloats(k) floats.
  void (*round)(const TileProblem& problem, float* scratch, const TileResult& result);
};

int64_t TileScratchFloats(int64_t k);

const TileKernels& BestTileKernels();
const TileKernels& PortableTileKernels();

}  // namespace nibble
