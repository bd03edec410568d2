// Starts a planned W4Ax kernel.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/gemm_w4ax/plan.h"

namespace nibble::cuda {

// codes [params.rows, k] int8, 16-byte aligned. Fills in what follows from the plan: split, depth_blocks, weights_once.
void LaunchGemm(const Device& device, const GemmPlan& plan, const int8_t* codes, int64_t k, GemmParams params);

}  // namespace nibble::cuda
