#include "kernels/cuda/rows/plan.h"

#include <gtest/gtest.h>

namespace nibble::cuda {
namespace {

constexpr int64_t kShared = 227 << 10;

std::string Plan(const RowShape& shape) { return ToString(PlanRow(shape, kShared).value()); }

TEST(PlanRow, KeepsBfloat16RowsOfWholeBlocksInRegisters) {
  EXPECT_EQ(Plan({.k = 128, .quantized = true}), "registers: 32 threads x 1 units");
  EXPECT_EQ(Plan({.k = 1536, .quantized = true}), "registers: 96 threads x 1 units");
  EXPECT_EQ(Plan({.k = 4096, .quantized = true}), "registers: 256 threads x 1 units");
  EXPECT_EQ(Plan({.k = 8192, .quantized = true}), "registers: 512 threads x 1 units");
  EXPECT_EQ(Plan({.k = 14336, .quantized = true}), "registers: 448 threads x 2 units");
  EXPECT_EQ(Plan({.k = 28672, .quantized = true}), "registers: 448 threads x 4 units");
}

TEST(PlanRow, SendsTheOthersThroughSharedMemory) {
  EXPECT_EQ(Plan({.k = 37, .dtype = DType::kF32}), "shared: 32 threads, 552 bytes");
  EXPECT_EQ(Plan({.k = 8192, .quantized = true, .transformed = true}), "shared: 512 threads, 35328 bytes");
  EXPECT_EQ(Plan({.k = 8192, .dtype = DType::kF32, .quantized = true}), "shared: 512 threads, 35328 bytes");
  EXPECT_EQ(Plan({.k = 28672, .quantized = true, .transformed = true}), "shared: 1024 threads, 123648 bytes");
}

TEST(PlanRow, NamesTheLimitOfRowsThatDoNotFit) {
  const absl::Status status = PlanRow({.k = 65536, .dtype = DType::kF32}, kShared).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("65536 channels"), std::string::npos) << status;
  EXPECT_NE(status.message().find("232448"), std::string::npos) << status;
}

// Every quantized row up to the specification's limit has a plan, all of its units a thread.
TEST(PlanRow, CoversEveryLength) {
  for (int64_t k = kBlock; k <= 32768; k += kBlock) {
    const auto plan = PlanRow({.k = k, .quantized = true}, kShared);
    ASSERT_TRUE(plan.ok());
    ASSERT_TRUE(plan->in_registers);
    EXPECT_GE(int64_t{plan->threads} * plan->units * 16, k);
    EXPECT_EQ(plan->threads % 32, 0);
    EXPECT_LE(plan->threads, 512);
    EXPECT_EQ(plan->shared_bytes, k / kBlock * 8);
  }
}

}  // namespace
}  // namespace nibble::cuda
