// What the kernel is launched with. The kernel itself is in kernel.cuh, compiled once per configuration.
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_w4ax/config.h"
#include "kernels/cuda/gemm_w4ax/schedule.h"

namespace nibble::cuda {

enum class GemmOutput : int32_t {
  kBF16,     // rows of a multiple of 8 columns, 16-byte aligned
  kAnyBF16,
  kF32,
  kSiluMul,  // interleaved gate and up, bf16 [T, N/2]
};

struct GemmParams {
  const uint8_t* weights = nullptr;        // [N/64, depth_blocks, kW4AxBlockBytes]
  const float* channel_scale = nullptr;    // [N rounded up to 64]
  const float* token_scale = nullptr;      // [T]
  const int32_t* code_sums = nullptr;      // [T]
  const float* bias = nullptr;             // [N] or null
  void* out = nullptr;                     // [T, N]
  int32_t* partials = nullptr;             // sums of tiles whose K is cut between workers, see PartialBytes
  int32_t* arrivals = nullptr;             // [workers, kGemmArrivalsPerWorker], zeros between launches
  int64_t* clock = nullptr;                // null, or cycles and nanoseconds of the first thread block
  int rows = 0;                            // T
  int n = 0;
  int depth_blocks = 0;                    // of the weight's order, see layout.h
  GemmOutput output = GemmOutput::kBF16;
  bool weights_once = false;               // no other tile reads them again: do not keep them in L2
  WorkSplit split;
};

// Most workers of any split: bounds `arrivals`.
inline constexpr int kMaxGemmWorkers = 512;
inline constexpr int kGemmArrivalsPerWorker = 2;  // one per block

// The kernel of a configuration, as cudaLaunchKernelExC takes it; kernel_*.cu instantiate it.
template <int kIndex>
const void* GemmKernelOf();

}  // namespace nibble::cuda
