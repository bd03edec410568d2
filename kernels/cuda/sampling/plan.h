// How a row of logits is divided among blocks. Host code without CUDA.
#pragma once

#include <cstdint>

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

}  // namespace nibble::cuda
