// W4Ax linear layers for sm_80 to sm_89: 4-bit activation blocks on the 4-bit tensor cores, 8-bit ones (and all of W4A8)
// on the 8-bit tensor cores, exact in int32 over all of K. docs/kernels-gemm-sm80.md draws layouts and pipeline.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/staging.h"
#include "kernels/ops.h"

namespace nibble::cuda::sm80 {

// A stack of projections in device order, see layout.h.
struct W4AxWeight : Weight {
  Buffer blocks;               // u8 [ceil(N/128), K/128, kWeightBlockBytes]
  Buffer minima;               // s8 [ceil(N/128) · 128, MinimaDepth], of the 4-bit steps
  Buffer steps;                // i32 [K/128] place of each block in the kernel's order
  Buffer channel_scale;        // f32 [ceil(N/128) · 128]
  int64_t four_bit_blocks = 0;
};

// Brings host tensors in checkpoint order into device order, on the device. The parts share one block_bits; where it
// says 4, input codes must come with exponents. Arguments were checked in ops.cc. RESOURCE_EXHAUSTED without memory.
// Queues on the device's stream and waits for it.
absl::StatusOr<std::unique_ptr<Weight>> PackW4Ax(const Device& device, Staging& staging, std::span<const W4View> parts);

// The largest scratch a launch with weights [any N, k] and up to `max_rows` rows needs. Long inputs are computed in pieces.
int64_t LinearW4AxScratchBytes(int64_t k, int64_t max_rows, int multiprocessors);

// args.weight is this family's W4AxWeight, args.input is coded, with exponents if the weight has 4-bit blocks; code sums
// are not needed. Codes are 4-byte aligned. out is bf16 or f32. Capturable; the same bits for a row whatever the batch.
// Traps when a code of a 4-bit block is not of the form a4 · 2^e with -8 <= a4 <= 7.
void LinearW4Ax(const Device& device, const LinearArgs& args);

}  // namespace nibble::cuda::sm80
