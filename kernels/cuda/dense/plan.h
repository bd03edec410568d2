// How a dense linear is divided among blocks. Host code without CUDA.
#pragma once

#include <cstdint>

#include "kernels/ops.h"

namespace nibble::cuda {

inline constexpr int64_t kDensePanelN = 64;  // output features of a panel of the packed weight
inline constexpr int64_t kDenseStepK = 64;   // input features of a step of the pipeline

// How one launch divides [T, N] among blocks. The larger tiles read the weight from DRAM once and from shared memory
// seldom; the smaller ones do not multiply rows that are not there.
struct DensePlan {
  int rows = 0;     // of the input, for one block
  int outputs = 0;  // output features of a block
  int threads = 0;
  int stages = 0;   // depth of the pipeline over K; 0: the chain of fused multiply-adds
  int blocks = 1;   // of a multiprocessor at least

  constexpr bool mma() const { return stages > 0; }
  constexpr int stage_bytes() const { return (outputs + rows) * static_cast<int>(kDenseStepK) * 2; }
  constexpr int shared_bytes() const { return stages * stage_bytes(); }
};
inline constexpr DensePlan kDenseChainPlan = {.rows = 32, .outputs = 32, .threads = 256};
inline constexpr int kNumDensePlans = 6;
inline constexpr int kDensePlansBeforeHopper = 4;  // the others need more shared memory than 8.x has
inline constexpr DensePlan kDensePlans[kNumDensePlans] = {
    {.rows = 8, .outputs = 64, .threads = 128, .stages = 8, .blocks = 3},
    {.rows = 16, .outputs = 64, .threads = 128, .stages = 7, .blocks = 3},
    {.rows = 32, .outputs = 64, .threads = 128, .stages = 6, .blocks = 3},
    {.rows = 64, .outputs = 128, .threads = 256, .stages = 4, .blocks = 2},
    {.rows = 128, .outputs = 128, .threads = 256, .stages = 6},
    {.rows = 256, .outputs = 128, .threads = 256, .stages = 4},
};

// The plan for `rows` rows of type `in` on a device whose blocks have this much shared memory. Which arithmetic it uses
// depends on k and `in` alone.
DensePlan PlanDense(int64_t rows, int64_t k, DType in, int64_t shared_bytes);

}  // namespace nibble::cuda
