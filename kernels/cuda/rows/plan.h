// How a row is spread over a thread block: pure functions of its shape, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// One block per row. A row is cut into blocks of 128 channels, these into octets of eight neighbours (the unit of the
// order of sums, kernels/cpu/rows_inl.h).
struct RowPlan {
  // Rows that stay in registers from load to code: bf16, whole blocks, neither Hadamard nor permutation. Otherwise the
  // row passes through shared memory as f32.
  bool in_registers = false;
  int threads = 0;           // per block, whole warps
  int units = 0;             // in registers: (octet q, octet q + 8) pairs per thread: 1, 2 or 4
  int64_t shared_bytes = 0;  // dynamic
};

// What a row operator does with rows of K channels.
struct RowShape {
  int64_t k = 0;
  DType dtype = DType::kBF16;
  bool quantized = false;
  bool transformed = false;  // by Hadamard or permutation
};

// INVALID_ARGUMENT with the limit when a row does not fit into a block's shared memory.
absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int64_t shared_limit_bytes);

// "registers: 256 threads x 2 units" or "shared: 512 threads, 35072 bytes".
std::string ToString(const RowPlan& plan);

}  // namespace nibble::cuda
