// W4Ax linear layers on sm_90a: int4 two-level weights × int8 codes on the int8 tensor cores, exact in int32 over all
// of K. docs/kernels-gemm.md draws the weight order and the pipeline.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/staging.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// A stack of projections in device order, see layout.h.
struct W4AxWeight : Weight {
  Buffer blocks;         // u8 [ceil(N/64), padded K/128, kW4AxBlockBytes]
  Buffer channel_scale;  // f32 [ceil(N/64) · 64]
  Buffer arrivals;       // i32, zero between launches: who has left its sums of a tile whose K is split
  bool gate_up = false;  // rows of two equal projections interleaved by eight, for LinearSiluMulW4Ax
};

struct PackW4AxOptions {
  // Two projections of equal N, a multiple of 32: rows [8i, 8i+8) of the first (gate), then of the second (up).
  bool interleave_gate_up = false;
};

// Brings host tensors in checkpoint order into device order, on the device. Arguments were checked in ops.cc.
// RESOURCE_EXHAUSTED without memory. Queues on the device's stream and waits for it.
absl::StatusOr<std::unique_ptr<Weight>> PackW4Ax(const Device& device, Staging& staging, std::span<const W4View> parts,
                                                 const PackW4AxOptions& options = {});

// The largest scratch a launch with weights [n, k] and up to `max_rows` rows needs.
int64_t LinearW4AxScratchBytes(int64_t n, int64_t k, int64_t max_rows, int multiprocessors);

// args.weight is a W4AxWeight that is not interleaved, args.input is coded and has code_sums; codes are 16-byte
// aligned. out is bf16 or f32. Capturable; the same bits for a row whatever the batch.
void LinearW4Ax(const Device& device, const LinearArgs& args);

// out [T, F] bf16 = silu(gate) · up, for an interleaved weight of N = 2F; gate and up are rounded to bf16 first, so the
// bits are those of Linear followed by the SiLU·mul of SiluMulQuantizeArgs. No bias.
void LinearSiluMulW4Ax(const Device& device, const LinearArgs& args);

}  // namespace nibble::cuda
