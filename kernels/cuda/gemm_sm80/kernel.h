// The kernels of the family and what they are launched with.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/gemm_sm80/layout.h"
#include "kernels/cuda/gemm_sm80/plan.h"

namespace nibble::cuda::sm80 {

// Brings coded rows into the kernel's order (layout.h) and clears `arrivals`. Traps where the code of a 4-bit block is
// not a multiple of 2^e between -8 · 2^e and 7 · 2^e.
struct ArrangeParams {
  const int8_t* codes = nullptr;       // [T, K]
  const uint8_t* exponents = nullptr;  // [T, K/128], not read without 4-bit blocks
  const int32_t* steps = nullptr;      // [K/128]
  Activations to;
  int32_t* arrivals = nullptr;
  int num_arrivals = 0;
  int64_t rows = 0;
  int blocks = 0;                      // K/128
  int four_bit_blocks = 0;
};
void LaunchArrange(const Device& device, const ArrangeParams& params);

struct GemmParams {
  const uint8_t* weights = nullptr;
  const int8_t* minima = nullptr;
  Activations input;
  const float* channel_scale = nullptr;  // [padded N]
  const float* token_scale = nullptr;    // [T]
  const float* bias = nullptr;           // [N] or null
  void* out = nullptr;                   // [T, N]
  int32_t* partials = nullptr;           // sums of tiles whose K is cut: two tiles for each worker
  int32_t* arrivals = nullptr;           // [stream tiles] workers that have left their sums
  int rows = 0;
  int n = 0;
  int depth = 0;                         // MinimaDepth
  bool bf16 = false;
  WorkSplit split;
};
void LaunchGemm(const Device& device, const GemmPlan& plan, GemmParams params);

}  // namespace nibble::cuda::sm80
