// From one f16 scale and zero per group to the two-level grid of docs/numerics.md, where the scales of a row's groups
// are small integer multiples of one f32.
#pragma once

#include <cstdint>

#include "common/base/thread_pool.h"
#include "common/model/checkpoint.h"
#include "tools/quantize/import_packing.h"

namespace nibble {

// How far the imported weights are from the source's, in steps (scales) of the source's groups. What the source itself
// lost by rounding is about 1/√12 = 0.29 steps.
struct GridFit {
  double rms_steps = 0;
  double max_steps = 0;
  bool exact() const { return max_steps < 1e-4; }
};

// For every row the s_w = max scale / x is taken, x in eighths from 1 to 16, for which Σ (ŵ − w)² is least; then per
// group s2 = round(scale / s_w), m with both ranges centred on each other, and each weight's code is rounded anew.
// Exact when a row's scales are multiples (up to 16) of one number and |zero|·s2, (15 − zero)·s2 stay in the format's
// range. All input blocks have 8 bits.
LinearTensors MapOntoGrid(const ForeignLinear& linear, const LinearShape& shape, ThreadPool* pool, GridFit* fit);

}  // namespace nibble
