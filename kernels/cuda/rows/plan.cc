#include "kernels/cuda/rows/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kWarp = 32;
constexpr int64_t kMostThreads = 1024;
// Where rows wait for SMs, smaller blocks let one row's loads overlap another's arithmetic.
constexpr int64_t kMostThreadsOfMany = 384;
constexpr int64_t kManyRowsPerMultiprocessor = 2;
constexpr int64_t kUnitChannels = 16;  // of a thread at a time, packed
constexpr int64_t kOctetChannels = 8;  // of a thread at a time, as f32
// Per block of 128 channels: its sum of squares, largest magnitude and bits.
constexpr int64_t kBlockStateBytes = 12;
constexpr int64_t kPadBytes = 32;  // per block, for Hadamard's strides

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for `items`, each thread taking as many as any other if that is possible.
int EvenThreads(int64_t items, int64_t most) {
  const int64_t rounds = CeilDiv(items, most);
  return static_cast<int>(CeilDiv(CeilDiv(items, rounds), kWarp) * kWarp);
}

}  // namespace

absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int64_t shared_limit_bytes, int multiprocessors) {
  const int64_t blocks = CeilDiv(shape.k, kBlock), channels = blocks * kBlock;
  const bool many = shape.rows > kManyRowsPerMultiprocessor * multiprocessors;
  RowPlan plan;
  plan.packed = shape.dtype == DType::kBF16 && shape.quantized && !shape.hadamard && !shape.perm;
  if (plan.packed) {
    // Among many rows a thread takes two units at least, which share its work per row.
    const int64_t units = channels / kUnitChannels;
    plan.threads = EvenThreads(units, many ? std::clamp(units / 2, 2 * kWarp, kMostThreadsOfMany) : kMostThreads);
    plan.shared_bytes = channels * 2 + blocks * kBlockStateBytes;
  } else {
    // A row so long that no second block fits on its SM has all of the SM's threads.
    plan.shared_bytes = channels * 4 + blocks * (kBlockStateBytes + (shape.hadamard ? kPadBytes : 0));
    const bool alone = 2 * plan.shared_bytes > shared_limit_bytes;
    plan.threads = EvenThreads(channels / kOctetChannels, many && !alone ? kMostThreadsOfMany : kMostThreads);
  }
  if (plan.shared_bytes > shared_limit_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a row of ", shape.k, " channels needs ", plan.shared_bytes,
                                                   " bytes of shared memory, a block of this device has ",
                                                   shared_limit_bytes));
  }
  return plan;
}

std::string ToString(const RowPlan& plan) {
  return absl::StrCat(plan.packed ? "packed: " : "f32: ", plan.threads, " threads, ", plan.shared_bytes, " bytes");
}

}  // namespace nibble::cuda
