// Operators that work row by row on the GPU: embedding, residual + norm, SiLU · up, and the coding of a linear's input.
// Scales, codes, exponents and sums have the bits of the CPU specification (kernels/cpu/rows_inl.h).
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/rows/plan.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// Arguments were checked in ops.cc; plans come from PlanRow. A token id or row index out of range traps. No scratch.
void Embed(const Device& device, const EmbedArgs& args);
void AddNormQuantize(const Device& device, const AddNormQuantizeArgs& args, const RowPlan& plan);
void Quantize(const Device& device, const QuantizeArgs& args, const RowPlan& plan);
void SiluMulQuantize(const Device& device, const SiluMulQuantizeArgs& args, const RowPlan& plan);

}  // namespace nibble::cuda
