#include "kernels/cuda/rows/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kWarp = 32;
constexpr int64_t kMostThreads = 1024;
constexpr int64_t kBlockOctets = 16;
constexpr int kMostSlices = 8;  // what every device with clusters can schedule
// Up to so many rows per multiprocessor a row is spread as far as that shortens its way; from there on what counts is
// how little is done per row.
constexpr int64_t kFewRowsPerMultiprocessor = 2;
constexpr int64_t kSliceThreads = 512;
// Rows that wait in shared memory: as many threads as let three blocks of bf16 or two of f32 run on a multiprocessor, and
// of rows so long that only one fits, as many as its registers allow.
constexpr int64_t kPackedThreads = 320;
constexpr int64_t kPackedF32Threads = 448;
constexpr int64_t kPackedUnits = 4;  // of a thread at least, which share its work per row
constexpr int64_t kPackedThreadsAlone = 896;
constexpr int64_t kManyF32Threads = 384;
constexpr int64_t kBlockStateBytes = 12;  // per block of 128, of an f32 row
constexpr int64_t kPadBytes = 32;         // per block, for Hadamard's strides
constexpr int64_t kMaximaBytes = 8;       // per warp of a row
constexpr int64_t kOctetBytes = 16;       // as bf16; twice that as f32
constexpr int64_t kWarpBlocks = 4;       
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
RowPlan InSharedMemory(int64_t blocks, bool f32, bool many, int64_t shared_limit_bytes) {
  const int64_t bytes = blocks * (kBlockOctets * kOctetBytes * (f32 ? 2 : 1) + static_cast<int64_t>(sizeof(float)));
  const int64_t units = CeilDiv(blocks, kWarpBlocks) * kWarp;
  int64_t threads = kPackedThreadsAlone;
  if (many && 2 * bytes <= shared_limit_bytes) {
    const int64_t most = f32 ? kPackedF32Threads : kPackedThreads;
    threads = std::clamp(units / kPackedUnits, kWarp, most);
  }
  return {.kind = RowPlan::Kind::kPacked,
          .octets = 2,
          .threads = EvenThreads(units, threads),
          .shared_bytes = bytes};
}

RowPlan PlanWholeBlocks(const RowShape& shape, int64_t blocks, int capability, int64_t shared_limit_bytes, bool many) {
  const bool f32 = shape.hadamard > 1;
  if (many && shape.norm) return InRegisters(blocks, 4, 1);
  if (many) return InSharedMemory(blocks, f32, many, shared_limit_bytes);
  int slices = 1;
  while (capability >= 90 && slices < kMostSlices && InRegisters(blocks, 2, slices).threads > kSliceThreads) slices *= 2;
  const RowPlan plan = InRegisters(blocks, 2, slices);
  if (plan.threads <= kMostThreads) return plan;
  return shape.norm ? InRegisters(blocks, 4, slices) : InSharedMemory(blocks, f32, many, shared_limit_bytes);
}

}  // namespace

absl::StatusOr<RowPlan> PlanRow(const RowShape& shape, int capability, int64_t shared_limit_bytes, int multiprocessors) {
  const int64_t blocks = CeilDiv(shape.k, kBlock);
  const bool many = shape.rows > kFewRowsPerMultiprocessor * multiprocessors;
  RowPlan plan;
  // A norm holds a row in the registers of one block at most.
  const bool transformed = shape.hadamard > 1;
  if (shape.dtype == DType::kBF16 && shape.quantized && !shape.perm &&
      (!transformed || (!shape.norm && shape.hadamard <= kMostWarpHadamard)) &&
      InRegisters(blocks, 4, 1).threads <= kMostThreads) {
    plan = PlanWholeBlocks(shape, blocks, capability, shared_limit_bytes, many);
  } else {
    // A row so long that no second block fits on its SM has all of the SM's threads.
    plan.shared_bytes = blocks * (kBlock * 4 + kBlockStateBytes + (transformed ? kPadBytes : 0));
    const bool alone = 2 * plan.shared_bytes > shared_limit_bytes;
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
