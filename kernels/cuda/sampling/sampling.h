// Sampling on the GPU: the ids, bits of log-probabilities and counts of kernels/cpu/sampling_inl.h.
//
// A row of logits is cut into segments, one per block of a thread block cluster, and stays in shared memory from the
// one time it is read: the maximum, the cuts of top-k and top-p, the log-probabilities and the draw all work there.
// Every sum is one of integers, so neither the cut nor the order of the blocks shows in the results.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// How a launch treats each row.
struct SamplePlan {
  int cluster = 1;            // blocks per row: 1, 2, 4 or 8
  int64_t segment = 0;        // ids of one block, a multiple of the draw's 64
  bool in_shared = true;      // false: the row is copied to scratch memory, as it does not fit
  int64_t shared_bytes = 0;   // dynamic, per block
};

// Clusters exist from compute capability 90 on; shared_bytes is the device's limit per block.
SamplePlan PlanSample(int64_t vocab, int capability, int64_t shared_bytes);

// Scratch that Sample needs for `rows` rows: 0 where rows fit into shared memory.
int64_t SampleScratchBytes(int64_t rows, int64_t vocab, int capability, int64_t shared_bytes);

// Arguments were checked by Ops::Sample. A token id or a row of parameters outside its range traps.
void Sample(const Device& device, const SampleArgs& args);

// As Ops::RecordHistory; no scratch.
void RecordHistory(const Device& device, const RecordHistoryArgs& args);

}  // namespace nibble::cuda
