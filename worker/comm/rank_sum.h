// The addition behind AllReduceSum, apart from any transport.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "common/base/float16.h"
#include "kernels/ops.h"

namespace nibble {

// out[i] = parts[0][i] + parts[1][i] + ..., in f32, left to right, one rounding to dtype. out may be one of the parts.
inline void SumInRankOrder(std::span<const void* const> parts, DType dtype, int64_t count, void* out) {
  constexpr int64_t kStrip = 512;  // accumulators that stay in the first-level cache
  float sum[kStrip];
  for (int64_t begin = 0; begin < count; begin += kStrip) {
    const int64_t n = std::min(kStrip, count - begin);
    for (size_t r = 0; r < parts.size(); ++r) {
      if (dtype == DType::kF32) {
        const float* part = static_cast<const float*>(parts[r]) + begin;
        for (int64_t i = 0; i < n; ++i) sum[i] = r == 0 ? part[i] : sum[i] + part[i];
      } else {
        const BF16* part = static_cast<const BF16*>(parts[r]) + begin;
        for (int64_t i = 0; i < n; ++i) sum[i] = r == 0 ? ToFloat(part[i]) : sum[i] + ToFloat(part[i]);
      }
    }
    if (dtype == DType::kF32) {
      std::copy(sum, sum + n, static_cast<float*>(out) + begin);
    } else {
      BF16* to = static_cast<BF16*>(out) + begin;
      for (int64_t i = 0; i < n; ++i) to[i] = ToBF16(sum[i]);
    }
  }
}

}  // namespace nibble
