// How rows are spread over thread blocks: pure functions of their shape, tested without a GPU. Bits do not depend on it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble::cuda {

struct RowPlan {
  // Where a row waits for its scale to be known.
  enum class Kind : uint8_t {
    kRegisters,  // every thread holds one unit of `octets` octets (bf16 rows of whole blocks of 128, not permuted, a
                 // Hadamard transform inside a warp and not of a norm)
    kPacked,     // such rows, but not of a norm, in shared memory: a thread takes unit after unit
    kF32,        // as f32 in shared memory, where all threads reach all channels
  };
  Kind kind = Kind::kF32;
  int slices = 1;            // blocks of a row; more than one are a cluster
  int octets = 0;            // of a unit: 2 or 4
  int threads = 0;           // per block, whole warps
  int64_t shared_bytes = 0;  // dynamic
};

// What a row operator does with rows of K channels.
struct RowShape {
  int64_t rows = 0;
  int64_t k = 0;
  DType dtype = DType::kBF16;
  bool norm = false;
  bool quantized = false;
  int64_t hadamard = 0;  // 0 or size
  bool perm = false;
};

// The device's compute capability (clusters exist from 90 on), shared memory of a block, multiprocessors.
// INVALID_ARGUMENT with the limit when a row does not fit into a block's shared memory.
absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int capability, int64_t shared_limit_bytes, int multiprocessors);

// "registers: 4 slices of 448 threads, 2 octets each, 1344 bytes".
std::string ToString(const RowPlan& plan);

}  // namespace nibble::cuda
