#include "kernels/cuda/rows/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kUnitChannels = 16;
constexpr int64_t kWarp = 32;
constexpr int64_t kSharedPathThreads = 512;
constexpr int64_t kLongRow = 16384;  // channels: blocks of so much shared memory share no SM, so they are larger
constexpr int64_t kLongRowThreads = 1024;
// Per block of 128 channels: its sum of squares and its largest magnitude; in shared memory also its values, padded.
constexpr int64_t kBlockStateBytes = 8;
constexpr int64_t kBlockValueBytes = (kBlock + 8) * 4;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Most threads of a block by units per thread: more units need more registers.
constexpr struct {
  int units;
  int64_t threads;
} kRegisterShapes[] = {{1, 512}, {2, 512}, {4, 512}};

}  // namespace

absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int64_t shared_limit_bytes) {
  const int64_t blocks = CeilDiv(shape.k, kBlock);
  if (shape.dtype == DType::kBF16 && shape.quantized && !shape.transformed && shape.k % kBlock == 0) {
    const int64_t units = shape.k / kUnitChannels;
    for (const auto& [per_thread, most_threads] : kRegisterShapes) {
      const int64_t threads = CeilDiv(CeilDiv(units, per_thread), kWarp) * kWarp;
      if (threads > most_threads) continue;
      return RowPlan{.in_registers = true,
                     .threads = static_cast<int>(threads),
                     .units = per_thread,
                     .shared_bytes = blocks * kBlockStateBytes};
    }
  }
  const int64_t octets = blocks * kBlock / 8;
  const int64_t most_threads = shape.k >= kLongRow ? kLongRowThreads : kSharedPathThreads;
  RowPlan plan = {.threads = static_cast<int>(std::min(most_threads, CeilDiv(octets, kWarp) * kWarp)),
                  .shared_bytes = blocks * (kBlockValueBytes + kBlockStateBytes)};
  if (plan.shared_bytes > shared_limit_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a row of ", shape.k, " channels needs ", plan.shared_bytes,
                                                   " bytes of shared memory, a block of this device has ",
                                                   shared_limit_bytes));
  }
  return plan;
}

std::string ToString(const RowPlan& plan) {
  if (plan.in_registers) return absl::StrCat("registers: ", plan.threads, " threads x ", plan.units, " units");
  return absl::StrCat("shared: ", plan.threads, " threads, ", plan.shared_bytes, " bytes");
}

}  // namespace nibble::cuda
