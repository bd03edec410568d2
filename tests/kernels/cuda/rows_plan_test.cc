#include "kernels/cuda/rows/plan.h"

#include <gtest/gtest.h>

namespace nibble::cuda {
namespace {

constexpr int64_t kShared = 227 << 10;  // of a block on the H200, and its multiprocessors
constexpr int kMultiprocessors = 132;

std::string Plan(const RowShape& shape) { return ToString(PlanRow(shape, kShared, kMultiprocessors).value()); }

TEST(PlanRow, PacksBfloat16RowsOfWholeBlocks) {
  EXPECT_EQ(Plan({.rows = 1, .k = 128, .quantized = true}), "packed: 32 threads, 268 bytes");
  EXPECT_EQ(Plan({.rows = 1, .k = 1536, .quantized = true}), "packed: 96 threads, 3216 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 8192, .quantized = true}), "packed: 512 threads, 17152 bytes");
  EXPECT_EQ(Plan({.rows = 264, .k = 28672, .quantized = true}), "packed: 896 threads, 60032 bytes");
}

TEST(PlanRow, GivesManyRowsSmallerBlocks) {
  EXPECT_EQ(Plan({.rows = 265, .k = 28672, .quantized = true}), "packed: 384 threads, 60032 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .quantized = true}), "packed: 256 threads, 17152 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 4096, .quantized = true}), "packed: 128 threads, 8576 bytes");
}

TEST(PlanRow, KeepsTheOthersAsF32) {
  EXPECT_EQ(Plan({.rows = 1, .k = 37, .dtype = DType::kF32}), "f32: 32 threads, 524 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .quantized = true, .perm = true}), "f32: 352 threads, 33536 bytes");
  EXPECT_EQ(Plan({.rows = 1, .k = 8192, .dtype = DType::kF32, .quantized = true}), "f32: 1024 threads, 33536 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 28672, .quantized = true, .hadamard = true}), "f32: 896 threads, 124544 bytes");
}

TEST(PlanRow, NamesTheLimitOfRowsThatDoNotFit) {
  const absl::Status status = PlanRow({.rows = 1, .k = 65536, .dtype = DType::kF32}, kShared, kMultiprocessors).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("65536 channels"), std::string::npos) << status;
  EXPECT_NE(status.message().find("232448"), std::string::npos) << status;
}

// Every quantized row up to the specification's limit has a plan that a block can be launched with.
TEST(PlanRow, CoversEveryLength) {
  for (int64_t rows : {1, 300}) {
    for (int64_t k = kBlock; k <= 32768; k += kBlock) {
      for (const bool hadamard : {false, true}) {
        const auto plan =
            PlanRow({.rows = rows, .k = k, .quantized = true, .hadamard = hadamard}, kShared, kMultiprocessors);
        ASSERT_TRUE(plan.ok()) << plan.status();
        EXPECT_EQ(plan->packed, !hadamard);
        EXPECT_EQ(plan->threads % 32, 0);
        EXPECT_GE(plan->threads, 32);
        EXPECT_LE(plan->threads, 1024);
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
