#include "kernels/cuda/rows/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kWarp = 32;
constexpr int64_t kMostThreads = 1024;
constexpr int64_t kBlockOctets = 16;
constexpr int kMostSlices = 8;  // what every device with clusters can schedule
// Rows whose units, of two octets, fit into the device's registers all at once are spread as far as that shortens their
// way; from there on what counts is how little is done per row.
constexpr int64_t kUnitThreadsPerMultiprocessor = 1024;
constexpr int64_t kSliceThreads = 512;
// Rows that wait in shared memory: threads of a block that is alone on its multiprocessor, one of two, or one of three;
// as many as registers allow.
constexpr int64_t kPackedThreads[] = {896, 448, 320};
constexpr int64_t kPackedUnits = 4;  // of a thread at least where rows wait for SMs, which share its work per row
constexpr int64_t kManyRowsPerMultiprocessor = 2;
constexpr int64_t kManyF32Threads = 384;
constexpr int64_t kBlockStateBytes = 12;  // per block of 128, of an f32 row
constexpr int64_t kPadBytes = 32;         // per block, for Hadamard's strides
constexpr int64_t kMaximaBytes = 8;       // per warp of a row
constexpr int64_t kOctetBytes = 16;       // as bf16; twice that as f32
constexpr int64_t kWarpBlocks = 4;        // of a warp of threads with two octets
constexpr int64_t kMostWarpHadamard = kWarpBlocks * kBlock;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t WholeWarps(int64_t threads) { return CeilDiv(threads, kWarp) * kWarp; }

// Threads for `items`, each thread taking as many as any other if that is possible.
int EvenThreads(int64_t items, int64_t most) {
  return static_cast<int>(WholeWarps(CeilDiv(items, CeilDiv(items, most))));
}

// One unit a thread.
RowPlan InRegisters(int64_t blocks, int octets, int slices) {
  const int64_t slice_blocks = CeilDiv(blocks, slices * kWarpBlocks) * kWarpBlocks;
  const int64_t threads = WholeWarps(slice_blocks * kBlockOctets / octets);
  return {.kind = RowPlan::Kind::kRegisters,
          .slices = slices,
          .octets = octets,
          .threads = static_cast<int>(threads),
          .shared_bytes = slices * threads / kWarp * kMaximaBytes + blocks * static_cast<int64_t>(sizeof(float))};
}

// Units of two octets, as bf16 or as f32.
RowPlan InSharedMemory(const RowShape& shape, int64_t blocks, int64_t shared_limit_bytes, int multiprocessors) {
  const bool f32 = shape.hadamard > 1;
  const int64_t bytes = blocks * (kBlockOctets * kOctetBytes * (f32 ? 2 : 1) + static_cast<int64_t>(sizeof(float)));
  const int64_t units = CeilDiv(blocks, kWarpBlocks) * kWarp;
  const int64_t fit = shared_limit_bytes / bytes;  // blocks of a multiprocessor
  int64_t together = std::clamp<int64_t>(CeilDiv(shape.rows, multiprocessors), 1, f32 ? 2 : 3);
  together = std::clamp<int64_t>(fit, 1, together);
  int64_t threads = kPackedThreads[together - 1];
  if (shape.rows > kManyRowsPerMultiprocessor * multiprocessors) {
    threads = std::clamp(units / kPackedUnits, kWarp, threads);
  }
  return {.kind = RowPlan::Kind::kPacked,
          .octets = 2,
          .threads = EvenThreads(units, threads),
          .shared_bytes = bytes};
}

RowPlan PlanWholeBlocks(const RowShape& shape, int64_t blocks, int capability, int64_t shared_limit_bytes,
                        int multiprocessors) {
  const int64_t row_threads = InRegisters(blocks, 2, 1).threads;
  if (shape.rows * row_threads <= kUnitThreadsPerMultiprocessor * multiprocessors) {
    int slices = 1;
    while (capability >= 90 && slices < kMostSlices && InRegisters(blocks, 2, slices).threads > kSliceThreads) {
      slices *= 2;
    }
    const RowPlan plan = InRegisters(blocks, 2, slices);
    if (plan.threads <= kMostThreads) return plan;
  }
  if (shape.norm) return InRegisters(blocks, 4, 1);
  return InSharedMemory(shape, blocks, shared_limit_bytes, multiprocessors);
}

}  // namespace

absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int capability, int64_t shared_limit_bytes,
                                int multiprocessors) {
  const int64_t blocks = CeilDiv(shape.k, kBlock);
  RowPlan plan;
  // A norm holds a row in the registers of one block at most.
  const bool transformed = shape.hadamard > 1;
  if (shape.dtype == DType::kBF16 && shape.quantized && !shape.perm &&
      (!transformed || (!shape.norm && shape.hadamard <= kMostWarpHadamard)) &&
      InRegisters(blocks, 4, 1).threads <= kMostThreads) {
    plan = PlanWholeBlocks(shape, blocks, capability, shared_limit_bytes, multiprocessors);
  } else {
    // A row so long that no second block fits on its SM has all of the SM's threads.
    plan.shared_bytes = blocks * (kBlock * 4 + kBlockStateBytes + (transformed ? kPadBytes : 0));
    const bool alone = 2 * plan.shared_bytes > shared_limit_bytes;
    const bool many = shape.rows > kManyRowsPerMultiprocessor * multiprocessors;
    plan.threads = EvenThreads(blocks * kBlockOctets, many && !alone ? kManyF32Threads : kMostThreads);
  }
  if (plan.shared_bytes > shared_limit_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a row of ", shape.k, " channels needs ", plan.shared_bytes,
                                                   " bytes of shared memory, a block of this device has ",
                                                   shared_limit_bytes));
  }
  return plan;
}

std::string ToString(const RowPlan& plan) {
  const std::string bytes = absl::StrCat(plan.shared_bytes, " bytes");
  switch (plan.kind) {
    case RowPlan::Kind::kRegisters:
      return absl::StrCat("registers: ", plan.slices, plan.slices == 1 ? " slice of " : " slices of ", plan.threads,
                          " threads, ", plan.octets, " octets each, ", bytes);
    case RowPlan::Kind::kPacked:
      return absl::StrCat("packed: ", plan.threads, " threads, ", bytes);
    case RowPlan::Kind::kF32: break;
  }
  return absl::StrCat("f32: ", plan.threads, " threads, ", bytes);
}

}  // namespace nibble::cuda
