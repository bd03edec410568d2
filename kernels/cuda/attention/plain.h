// Attention for everything the operator page allows: any head size, f32 rows, f32 caches, any GPU. Simple, in f32.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace nibble::cuda {

void PlainAttention(const Device& device, const AttentionArgs& args);

}  // namespace nibble::cuda
