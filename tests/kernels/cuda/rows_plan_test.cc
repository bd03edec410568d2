#include "kernels/cuda/rows/plan.h"

#include <gtest/gtest.h>

namespace nibble::cuda {
namespace {

constexpr int64_t kShared = 227 << 10;  // of a block on the H200, and its multiprocessors
constexpr int kMultiprocessors = 132;

std::string Plan(const RowShape& shape, int capability = 90) {
  return ToString(PlanRow(shape, capability, kShared, kMultiprocessors).value());
}

TEST(PlanRow, HoldsFewRowsInRegisters) {
  EXPECT_EQ(Plan({.rows = 1, .k = 128, .quantized = true}), "registers: 1 slice of 32 threads, 2 octets each, 12 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 8192, .norm = true, .quantized = true}),
            "registers: 1 slice of 512 threads, 2 octets each, 384 bytes");
  EXPECT_EQ(Plan({.rows = 150, .k = 14336, .quantized = true}),
            "registers: 2 slices of 448 threads, 2 octets each, 672 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 28672, .quantized = true}),
            "registers: 4 slices of 448 threads, 2 octets each, 1344 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 28672, .quantized = true, .hadamard = 512}),
            "registers: 4 slices of 448 threads, 2 octets each, 1344 bytes");
}

TEST(PlanRow, HasNoSlicesWithoutClusters) {
  EXPECT_EQ(Plan({.rows = 32, .k = 14336, .quantized = true}, 80),
            "registers: 1 slice of 896 threads, 2 octets each, 672 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 28672, .quantized = true}, 80), "packed: 896 threads, 58240 bytes");
  EXPECT_EQ(Plan({.rows = 32, .k = 28672, .norm = true, .quantized = true}, 80),
            "registers: 1 slice of 896 threads, 4 octets each, 1120 bytes");
}

TEST(PlanRow, DoesLessPerRowOfMany) {
  EXPECT_EQ(Plan({.rows = 128, .k = 28672, .quantized = true}), "packed: 896 threads, 58240 bytes");
  EXPECT_EQ(Plan({.rows = 256, .k = 28672, .quantized = true}), "packed: 448 threads, 58240 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .quantized = true}), "packed: 128 threads, 16640 bytes");
  EXPECT_EQ(Plan({.rows = 265, .k = 28672, .quantized = true}), "packed: 320 threads, 58240 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .norm = true, .quantized = true}),
            "registers: 1 slice of 256 threads, 4 octets each, 320 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 28672, .quantized = true, .hadamard = 512}), "packed: 448 threads, 115584 bytes");
}

TEST(PlanRow, KeepsTheOthersAsF32) {
  EXPECT_EQ(Plan({.rows = 1, .k = 37, .dtype = DType::kF32}), "f32: 32 threads, 524 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .quantized = true, .perm = true}), "f32: 352 threads, 33536 bytes");
  EXPECT_EQ(Plan({.rows = 1, .k = 8192, .dtype = DType::kF32, .quantized = true}), "f32: 1024 threads, 33536 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 28672, .quantized = true, .hadamard = 1024}), "f32: 896 threads, 124544 bytes");
  EXPECT_EQ(Plan({.rows = 4096, .k = 8192, .norm = true, .quantized = true, .hadamard = 512}),
            "f32: 352 threads, 35584 bytes");
}

TEST(PlanRow, NamesTheLimitOfRowsThatDoNotFit) {
  const absl::Status status =
      PlanRow({.rows = 1, .k = 65536, .dtype = DType::kF32}, 90, kShared, kMultiprocessors).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("65536 channels"), std::string::npos) << status;
  EXPECT_NE(status.message().find("232448"), std::string::npos) << status;
}

// Every quantized row up to the specification's limit has a plan that a block can be launched with, and that takes it
// whole.
TEST(PlanRow, CoversEveryLength) {
  for (int64_t rows : {1, 300}) {
    for (int64_t k = kBlock; k <= 32768; k += kBlock) {
      for (int64_t hadamard : {0, 128, 4096}) {
        for (const bool norm : {false, true}) {
          for (int capability : {80, 90}) {
            const auto plan = PlanRow({.rows = rows, .k = k, .norm = norm, .quantized = true, .hadamard = hadamard},
                                      capability, kShared, kMultiprocessors);
            ASSERT_TRUE(plan.ok()) << plan.status();
            EXPECT_EQ(plan->threads % 32, 0);
            EXPECT_GE(plan->threads, 32);
            EXPECT_LE(plan->threads, 1024);
            EXPECT_LE(plan->slices, capability >= 90 ? 8 : 1);
            if (plan->kind == RowPlan::Kind::kRegisters) {
              EXPECT_GE(int64_t{plan->slices} * plan->threads * plan->octets * 8, k);
              EXPECT_TRUE(plan->octets == 2 || (norm && plan->slices == 1)) << k;
            } else if (plan->kind == RowPlan::Kind::kPacked) {
              EXPECT_FALSE(norm);
              EXPECT_LE(plan->threads, 896);
            } else {
              EXPECT_NE(hadamard, 0);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
