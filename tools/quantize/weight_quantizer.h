// Weights to the two-level 4-bit format of docs/numerics.md, by rounding to nearest with searched clipping.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/base/thread_pool.h"
#include "common/model/checkpoint.h"
#include "tools/quantize/dense_layer.h"
#include "tools/quantize/input_plan.h"

namespace nibble {

// One output row, columns in code order.
struct QuantizedRow {
  std::vector<uint8_t> codes;        // [K] 0..15
  std::vector<uint8_t> group_scale;  // [K/128] 1..16
  std::vector<int8_t> group_min;     // [K/128] -119..119, min + 15 scale <= 127
  float channel_scale = 0;
};

// Minimises Σ_k (ŵ − w)²·importance[k] over a small grid: the row's scale clipped to a few fractions of max|w|, and,
// for every group of 128, a few scales at and below round((max − min)/15) with the clipped range shifted between the
// two ends. importance is E[x²] of the input channel: the expected squared error of the output when channels are
// uncorrelated.
QuantizedRow QuantizeRow(std::span<const float> weight, std::span<const float> importance);

// The values a QuantizedRow stands for.
std::vector<float> DequantizeRow(const QuantizedRow& row);

// A whole linear [N, K] whose input is coded by `plan`; columns are permuted into code order. mean_square [K] in
// channel order.
LinearTensors QuantizeLinear(const DenseLinear& linear, const InputPlan& plan, std::span<const float> mean_square,
                             ThreadPool* pool);

}  // namespace nibble
