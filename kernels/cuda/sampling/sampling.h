// Sampling on the GPU: the ids, bits of log-probabilities and counts of kernels/cpu/sampling_inl.h.
//
// A row of logits is cut into segments, one per block of a thread block cluster, and stays in shared memory from the
// one time it is read: the maximum, the cuts of top-k and top-p, the log-probabilities and the draw all work there.
// Every sum is one of integers, so neither the cut nor the order of the blocks shows in the results.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/sampling/plan.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// Arguments were checked by Ops::Sample. A token id or a row of parameters outside its range traps.
void Sample(const Device& device, const SampleArgs& args);

// As Ops::RecordHistory; no scratch.
void RecordHistory(const Device& device, const RecordHistoryArgs& args);

}  // namespace nibble::cuda
