#include "tools/quantize/weight_quantizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/base/check.h"
#include "kernels/ops.h"

namespace nibble {
namespace {

constexpr int kMaxLevel = 119;  // of |Q8|: 119 + 7 of a group's rounded range stays in int8
constexpr float kRowClips[] = {1.0f, 0.93f, 0.86f, 0.8f};
constexpr int kScaleSteps[] = {0, -1, -2, -3};
constexpr int64_t kLanes = 8;
constexpr float kShifts[] = {0.0f, 0.25f, 0.5f, 0.75f, 1.0f};

// Round to nearest even for |x| < 2^22, in a form that vectorises on every x86 (no SSE4.1 round instruction).
inline float RoundNear(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23
  return (x + kMagic) - kMagic;
}

inline float Code(float level, float min, float inverse_scale) {
  return std::min(std::max(RoundNear((level - min) * inverse_scale), 0.0f), 15.0f);
}

struct Group {
  float scale = 1;
  float min = 0;
  float error = std::numeric_limits<float>::infinity();
};

// level [128]: weights in units of the row's scale, not clipped.
Group SearchGroup(const float* level, const float* importance) {
  float high = -kMaxLevel, low = kMaxLevel;
  for (int64_t i = 0; i < kBlock; ++i) {
    const float clipped = std::min(std::max(RoundNear(level[i]), -119.0f), 119.0f);
    high = std::max(high, clipped);
    low = std::min(low, clipped);
  }
  const float nearest = std::max(1.0f, RoundNear((high - low) / 15));
  Group best;
  for (const int step : kScaleSteps) {
    const float scale = nearest + static_cast<float>(step);
    if (scale < 1) break;
    const float inverse = 1 / scale;
    float last_min = std::numeric_limits<float>::quiet_NaN();
    for (const float shift : kShifts) {
      float min = RoundNear(low + ((high - low) - 15 * scale) * shift);
      min = std::min({std::max(min, -119.0f), 119.0f, 127 - 15 * scale});
      if (min == last_min) continue;
      last_min = min;
      float partial[kLanes] = {};  // independent sums, so that the loop vectorises without reordering anything
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const float value = Code(level[i + lane], min, inverse) * scale + min;
          const float difference = value - level[i + lane];
          partial[lane] += difference * difference * importance[i + lane];
        }
      }
      const float error = std::accumulate(std::begin(partial), std::end(partial), 0.0f);
      if (error < best.error) best = {.scale = scale, .min = min, .error = error};
    }
  }
  return best;
}

}  // namespace

QuantizedRow QuantizeRow(std::span<const float> weight, std::span<const float> importance) {
  const int64_t k = static_cast<int64_t>(weight.size()), groups = k / kBlock;
  NIBBLE_CHECK_EQ(k % kBlock, 0);
  NIBBLE_CHECK_EQ(importance.size(), weight.size());
  QuantizedRow row;
  row.codes.assign(weight.size(), 0);
  row.group_scale.assign(static_cast<size_t>(groups), 1);
  row.group_min.assign(static_cast<size_t>(groups), 0);
  float largest = 0;
  for (const float w : weight) largest = std::max(largest, std::fabs(w));
  // Below, 1/scale would overflow; such a row is zero to any precision that matters.
  if (!(largest > 1e-30f)) return row;

  std::vector<float> level(weight.size());
  std::vector<Group> found(static_cast<size_t>(groups)), best;
  double best_error = std::numeric_limits<double>::infinity();
  for (const float clip : kRowClips) {
    const float scale = largest * clip / kMaxLevel;
    for (size_t i = 0; i < weight.size(); ++i) level[i] = weight[i] / scale;
    double error = 0;
    for (int64_t g = 0; g < groups; ++g) {
      found[static_cast<size_t>(g)] = SearchGroup(level.data() + g * kBlock, importance.data() + g * kBlock);
      error += static_cast<double>(found[static_cast<size_t>(g)].error);
    }
    error *= static_cast<double>(scale) * static_cast<double>(scale);
    if (error < best_error) {
      best_error = error;
      best = found;
      row.channel_scale = scale;
    }
  }
  for (size_t i = 0; i < weight.size(); ++i) {
    const Group& group = best[i / kBlock];
    row.codes[i] = static_cast<uint8_t>(Code(weight[i] / row.channel_scale, group.min, 1 / group.scale));
  }
  for (size_t g = 0; g < best.size(); ++g) {
    row.group_scale[g] = static_cast<uint8_t>(best[g].scale);
    row.group_min[g] = static_cast<int8_t>(best[g].min);
  }
  return row;
}

std::vector<float> DequantizeRow(const QuantizedRow& row) {
  std::vector<float> weight(row.codes.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    weight[i] =
        row.channel_scale * static_cast<float>(row.codes[i] * row.group_scale[i / kBlock] + row.group_min[i / kBlock]);
  }
  return weight;
}

LinearTensors QuantizeLinear(const DenseLinear& linear, const InputPlan& plan, std::span<const float> mean_square,
                             ThreadPool* pool) {
  const int64_t n = linear.shape.n, k = linear.shape.k, groups = k / kBlock;
  NIBBLE_CHECK_EQ(static_cast<int64_t>(mean_square.size()), k);
  std::vector<int32_t> order = plan.perm;
  if (order.empty()) {
    order.resize(static_cast<size_t>(k));
    std::iota(order.begin(), order.end(), 0);
  }
  std::vector<float> importance(static_cast<size_t>(k));
  for (size_t i = 0; i < importance.size(); ++i) importance[i] = mean_square[static_cast<size_t>(order[i])];

  LinearTensors out;
  out.name = linear.shape.name;
  out.n = n;
  out.k = k;
  out.quantized = true;
  out.block_bits = plan.block_bits;
  out.input_perm = plan.perm;
  out.bias = linear.bias;
  out.qweight.resize(static_cast<size_t>(n * k / 2));
  out.group_scale.resize(static_cast<size_t>(n * groups));
  out.group_min.resize(static_cast<size_t>(n * groups));
  out.channel_scale.resize(static_cast<size_t>(n));
  pool->ParallelFor(n, [&](int64_t row, int) {
    std::vector<float> weight(static_cast<size_t>(k));
    const float* source = linear.weight.data() + row * k;
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = source[order[i]];
    const QuantizedRow quantized = QuantizeRow(weight, importance);
    uint8_t* packed = out.qweight.data() + row * k / 2;
    for (int64_t i = 0; i < k / 2; ++i) {
      packed[i] = static_cast<uint8_t>(quantized.codes[static_cast<size_t>(2 * i)] |
                                       quantized.codes[static_cast<size_t>(2 * i + 1)] << 4);
    }
    std::copy(quantized.group_scale.begin(), quantized.group_scale.end(), out.group_scale.begin() + row * groups);
    std::copy(quantized.group_min.begin(), quantized.group_min.end(), out.group_min.begin() + row * groups);
    out.channel_scale[static_cast<size_t>(row)] = quantized.channel_scale;
  });
  return out;
}

}  // namespace nibble
