// RoundingDevice on a GPU: Gram matrices, factors and sweeps, through cuBLAS, cuSOLVER and rounding_kernels.h.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "tools/quantize/gptq.h"

namespace nibble::cuda {

// Moments are sums in f32 of products of bf16 values (exact products; TF32 is never used): the input is rounded to
// bf16, the type that linears read on GPUs, so H is the exact Gram matrix of rounded inputs up to the f32 sums and
// stays positive semidefinite. Factors are made in f64. Sweeps are f32, as on the CPU; their sums have another order,
// so a code may differ where a target lies next to the middle of two values, and those after it in the row.
class CudaRoundingDevice : public RoundingDevice {
 public:
  // Device 0. `threads` of the host narrow inputs on their way to it. UNAVAILABLE when there is none.
  static absl::StatusOr<std::unique_ptr<CudaRoundingDevice>> Create(int threads);

  // Most bytes held at a time since the last call, moments and factors included, without the libraries' own workspaces
  // (tens of megabytes).
  virtual int64_t TakePeakBytes() = 0;
};

}  // namespace nibble::cuda
