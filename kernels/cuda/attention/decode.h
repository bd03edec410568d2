// Attention of rows one by one: every row streams its own context from memory, all query heads of a KV head together.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// Rows the kernel takes.
enum class DecodeRows : uint8_t {
  kAll,     // every row of the step
  kSingle,  // only rows whose sequence has no other row in the step
};

int64_t DecodeScratchBytes(int multiprocessors, int64_t head_dim, int64_t max_pages);
int64_t DecodeCounterBytes(int multiprocessors);

// bf16 rows, KV4, head_dim 64 or 128, sm_90. Scratch and counters as in attention.h.
void DecodeAttention(const Device& device, const AttentionArgs& args, DecodeRows rows, uint32_t* counters);

}  // namespace nibble::cuda
