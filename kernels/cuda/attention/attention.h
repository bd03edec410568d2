// RoPE + KV4 append, and causal grouped-query attention over the paged cache. docs/kernels-attention.md explains the
// page layout, the pipelines and the order of arithmetic.
//
// One arithmetic: the bits of an attention row depend on its query, its context and nothing else. The context is cut
// at fixed places into groups, chunks and streams of pages; decode and prefill compute the same chains of tensor-core
// steps over the same streams and fold the results in the same order (canonical.cuh).
//
// Positions, row tables and page tables are uploaded before a step and written by no kernel: they may be read before
// the kernels in front have finished.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// Bytes of Device::scratch that Attention() may use for steps of up to `max_rows` rows and page tables of `max_pages`.
int64_t AttentionScratchBytes(const Device& device, const KvLayout& layout, int64_t q_heads, int64_t max_rows,
                              int64_t max_pages);

// Bytes of the arrival counters that Attention() is given: device memory that lives as long as the backend, zeroed
// once; every launch leaves it zero. One set per stream.
int64_t AttentionCounterBytes(const Device& device);

// RopeAppendArgs as in ops.h. Codes and parameters of KV4 have the bits that the CPU specification gives; pages have
// the inner order of kv_page.h. A position or page id out of range traps.
void RopeAppend(const Device& device, const RopeAppendArgs& args);

// AttentionArgs as in ops.h. bf16 rows over KV4 with head sizes 64 and 128 run on tensor cores (sm_90); everything else
// the operator page allows runs in kernels that are simple and exact in f32. A page id out of range traps.
void Attention(const Device& device, const AttentionArgs& args, uint32_t* counters);

}  // namespace nibble::cuda
