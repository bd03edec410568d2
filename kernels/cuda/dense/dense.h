// Linear layers with dense bf16 weights on the GPU: lm_head, and every linear of an unquantized checkpoint.
//
// One arithmetic per weight and type of rows, whatever the number of rows: bf16 rows whose K is a multiple of
// kDenseStepK are multiplied by matrix instructions of 16 k (wgmma on sm_90a, mma.sync before), one after the other over
// k = 0, 16, 32, ... into one f32 accumulator, never split over K; all others are a chain of fused multiply-adds over
// k = 0, 1, 2, ... as on the CPU.
// The plan (how many rows and outputs a block takes) only decides which block computes an output.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/cuda/dense/plan.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/staging.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// bf16 [ceil(N/64) panels][ceil(K/16)][4 tiles of 16 outputs][32 lanes][8]: operand A of mma.m16n8k16 as the lanes hold
// it, so that a lane's fragment is one 16-byte load and a panel's step of 64 k is 8 KB in a row. Lane 4g + c holds
// outputs g and g + 8 at k = 2c, 2c + 1, then both at 2c + 8, 2c + 9. Outputs past N and k past K are zeros.
struct DenseWeight : Weight {
  Buffer data;
};

// Uploads and reorders on the device. RESOURCE_EXHAUSTED with the size when memory runs out, INTERNAL when the device
// is lost. Queues on the device's stream and waits for it.
absl::StatusOr<std::unique_ptr<Weight>> PackDense(const Device& device, Staging& staging,
                                                  std::span<const DenseView> parts);

// args.input.dense times args.weight, a DenseWeight. No scratch.
void LinearDense(const Device& device, const LinearArgs& args);

}  // namespace nibble::cuda
