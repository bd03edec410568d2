// How rows are spread over thread blocks: pure functions of their shape, tested without a GPU. Bits do not depend on it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// One block per row.
struct RowPlan {
  // A row waits in shared memory for its scale to be known: packed as bf16, each thread's part its own (bf16 rows of
  // whole blocks of 128, neither transformed nor permuted), or as f32, where all threads reach all channels.
  bool packed = false;
  int threads = 0;           // per block, whole warps
  int64_t shared_bytes = 0;  // dynamic
};

// What a row operator does with rows of K channels.
struct RowShape {
  int64_t rows = 0;
  int64_t k = 0;
  DType dtype = DType::kBF16;
  bool quantized = false;
  bool hadamard = false;
  bool perm = false;
};

// INVALID_ARGUMENT with the limit when a row does not fit into a block's shared memory.
absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int64_t shared_limit_bytes, int multiprocessors);

// "packed: 256 threads, 16896 bytes".
std::string ToString(const RowPlan& plan);

}  // namespace nibble::cuda
