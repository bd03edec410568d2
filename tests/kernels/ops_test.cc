// The page itself: making a backend, memory, and that every broken rule aborts with its values.
#include "kernels/ops.h"

#include <cstdint>
#include <vector>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

TEST(CreateOps, NamesWhatItCannotMake) {
  const absl::Status no_device = CreateOps({.backend = "cuda", .device = 1000}).status();
  EXPECT_EQ(no_device.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(no_device.message().find("CUDA"), std::string::npos) << no_device;
  EXPECT_EQ(CreateOps({.backend = "tpu"}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateOps({.backend = "cpu", .threads = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  auto ops = CreateOps({.backend = "cpu", .threads = 2});
  ASSERT_TRUE(ops.ok());
  EXPECT_EQ((*ops)->Describe(), std::string("cpu: 2 threads, ") + KernelsFor(AvailableIsas().back()).name);
}

TEST(Memory, IsZeroedAlignedAndRefusesTheImpossible) {
  auto ops = CreateCpuOps({});
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, size_t{100000}}) {
    auto buffer = ops->Allocate(bytes);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    EXPECT_EQ(buffer->bytes(), bytes);
    for (size_t i = 0; i < bytes; ++i) ASSERT_EQ(buffer->as<uint8_t>()[i], 0);
  }
  const auto impossible = ops->Allocate(SIZE_MAX - 10);
  EXPECT_EQ(impossible.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(ops->Synchronize().ok());
}

class OpsDeathTest : public ::testing::Test {
 protected:
  OpsDeathTest() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }

  std::unique_ptr<Ops> ops_ = CreateCpuOps({});
  std::vector<float> values_ = std::vector<float>(4096);
  std::vector<BF16> weights_ = std::vector<BF16>(4096);
  std::vector<int8_t> codes_ = std::vector<int8_t>(4096);
  std::vector<uint8_t> bits_ = {4};
  std::vector<int32_t> ids_ = {0, 0, 0, 0};
};

TEST_F(OpsDeathTest, ShapesAndNulls) {
  const InputCoding coding = {.k = 128, .quantized = true, .block_bits = bits_.data()};
  LinearInput out = {.rows = 2, .k = 128, .codes = codes_.data(), .scales = values_.data()};
  const Rows in = {values_.data(), DType::kF32, 3, 128};
  EXPECT_DEATH(ops_->Quantize({.in = in, .coding = &coding, .out = &out}), "2 vs 3");
  out.rows = 3;
  out.codes = nullptr;
  EXPECT_DEATH(ops_->Quantize({.in = in, .coding = &coding, .out = &out}), "codes or out.scales is null");
  const Rows narrow = {values_.data(), DType::kF32, 3, 100};
  EXPECT_DEATH(ops_->Quantize({.in = narrow, .coding = &coding, .out = &out}), "128 vs 100");
  InputCoding odd = {.k = 128, .quantized = false, .hadamard = 96};
  EXPECT_DEATH(ops_->Quantize({.in = in, .coding = &odd, .out = &out}), "hadamard size 96");
}

TEST_F(OpsDeathTest, WeightsAndInputsMustMatch) {
  const DenseView view = {16, 128, weights_.data()};
  auto dense = ops_->PackDense({&view, 1});
  ASSERT_TRUE(dense.ok());
  const Rows out = {values_.data(), DType::kF32, 1, 16};
  const LinearInput coded = {.rows = 1, .k = 128, .codes = codes_.data(), .scales = values_.data(), .code_sums = ids_.data()};
  EXPECT_DEATH(ops_->Linear({.input = coded, .weight = dense->get(), .out = out}), "PackW4");
  const Rows wide = {values_.data(), DType::kF32, 1, 17};
  EXPECT_DEATH(ops_->Linear({.input = coded, .weight = dense->get(), .out = wide}), "17 vs 16");
  EXPECT_DEATH((void)ops_->PackDense({}), "no projections");
  const std::vector<uint8_t> scale(16, 17), nibbles(16 * 64);
  // What comes from a file is refused, not fatal.
  const W4View bad = {16, 128, nibbles.data(), scale.data(), codes_.data(), values_.data()};
  const absl::Status refused = ops_->PackW4({&bad, 1}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(refused.message().find("scale 17"), std::string::npos) << refused;
  const W4View wide_view = {1, 1 << 16, nibbles.data(), scale.data(), codes_.data(), values_.data()};
  EXPECT_EQ(ops_->PackW4({&wide_view, 1}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(OpsDeathTest, IndicesStayInside) {
  ids_ = {5};
  EXPECT_DEATH(
      ops_->Embed(
          {.token_ids = ids_.data(), .table = weights_.data(), .vocab = 5, .out = {values_.data(), DType::kF32, 1, 8}}),
      "token id 5 of vocabulary 5");
  ids_ = {-1};
  EXPECT_DEATH(
      ops_->RecordHistory(
          {.history = reinterpret_cast<uint16_t*>(weights_.data()), .vocab = 5, .token_ids = ids_.data(), .count = 1}),
      "token id -1 of vocabulary 5");
  std::vector<int32_t> position = {64}, sequence = {0}, begin = {0, 1}, table = {0};
  const KvPages pages = {reinterpret_cast<uint8_t*>(values_.data()), 1, {KvFormat::kKV4, 1, 32}};
  StepRows step = {1, 1, position.data(), sequence.data(), begin.data(), table.data(), 1};
  const Rows qkv = {values_.data(), DType::kF32, 1, 96};
  const RopeAppendArgs rope = {
      .step = step, .qkv = qkv, .q_heads = 1, .cos_sin = values_.data(), .max_positions = 64, .pages = pages};
  EXPECT_DEATH(ops_->RopeAppend(rope), "position 64 of 64");
  position[0] = 3;
  table[0] = 1;
  EXPECT_DEATH(ops_->RopeAppend(rope), "page id 1 of 1");
  const AttentionArgs attention = {.step = step,
                                   .qkv = qkv,
                                   .q_heads = 1,
                                   .pages = pages,
                                   .scale = 1,
                                   .out = {values_.data(), DType::kF32, 1, 32}};
  EXPECT_DEATH(ops_->Attention(attention), "last BeginStep");
  ops_->BeginStep({.step = step, .q_heads = 1, .layout = pages.layout});
  EXPECT_DEATH(ops_->Attention(attention), "page id 1 of 1");
}

// A step without rows is legal everywhere and writes nothing.
TEST_F(OpsDeathTest, NoRowsIsANoOperation) {
  const InputCoding coding = {.k = 128, .quantized = true, .block_bits = bits_.data()};
  LinearInput out = {.rows = 0, .k = 128};
  ops_->Quantize({.in = {nullptr, DType::kF32, 0, 128}, .coding = &coding, .out = &out});
  ops_->SiluMulQuantize({.gate_up = {nullptr, DType::kF32, 0, 256}, .coding = &coding, .out = &out});
  ops_->Sample({.rows = 0, .vocab = 10});
  ops_->Embed({.vocab = 5, .out = {nullptr, DType::kF32, 0, 8}});
}

}  // namespace
}  // namespace nibble::testing
