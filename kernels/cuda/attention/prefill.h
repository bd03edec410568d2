// Attention of many rows of a sequence at once: tiles of 128 queries on warpgroup matrix instructions.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace nibble::cuda {

inline constexpr int64_t kMaxPrefillGroup = 64;  // query heads per KV head

int64_t PrefillScratchBytes(int multiprocessors, int64_t head_dim);

// Rows of sequences that have more than one row in the step; the others are left alone. bf16 rows, KV4, head_dim 64 or
// 128, at most kMaxPrefillGroup query heads per KV head, sm_90.
void PrefillAttention(const Device& device, const AttentionArgs& args);

}  // namespace nibble::cuda
