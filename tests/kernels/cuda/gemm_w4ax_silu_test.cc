// The fused SiLU · mul epilogue against the specification: Linear, then SiluMulQuantize, on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cuda/gemm_w4ax/gemm.h"

namespace nibble::cuda {
namespace {

struct Projection {
  std::vector<uint8_t> qweight, group_scale;
  std::vector<int8_t> group_min;
  std::vector<float> channel_scale;
  int64_t n, k;
  W4View View() const { return {n, k, qweight.data(), group_scale.data(), group_min.data(), channel_scale.data()}; }
};

Projection Random(int64_t n, int64_t k, uint32_t seed) {
  std::mt19937 random(seed);
  Projection p;
  p.n = n;
  p.k = k;
  for (int64_t i = 0; i < n * k / 2; ++i) p.qweight.push_back(static_cast<uint8_t>(random()));
  for (int64_t i = 0; i < n * k / kBlock; ++i) {
    const int scale = 1 + static_cast<int>(random() % 16), highest = std::min(119, 127 - 15 * scale);
    p.group_scale.push_back(static_cast<uint8_t>(scale));
    p.group_min.push_back(static_cast<int8_t>(static_cast<int>(random() % (highest + 120)) - 119));
  }
  for (int64_t i = 0; i < n; ++i) p.channel_scale.push_back(0.001f + 0.0001f * static_cast<float>(random() % 100));
  return p;
}

class SiluTest : public ::testing::Test {
 protected:
  void SetUp() override {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
      GTEST_SKIP() << "needs a GPU of compute capability 9.0";
    }
    device_.capability = 90;
    device_.multiprocessors = properties.multiProcessorCount;
    NIBBLE_CUDA_CHECK(cudaStreamCreate(&device_.stream));
    device_.scratch_bytes = 64 << 20;
    device_.scratch = static_cast<uint8_t*>(Memory(device_.scratch_bytes));
  }
  void TearDown() override {
    for (void* memory : memory_) NIBBLE_CUDA_CHECK(cudaFree(memory));
  }

  void* Memory(int64_t bytes) {
    void* memory = nullptr;
    NIBBLE_CUDA_CHECK(cudaMalloc(&memory, static_cast<size_t>(bytes)));
    NIBBLE_CUDA_CHECK(cudaMemset(memory, 0xff, static_cast<size_t>(bytes)));
    memory_.push_back(memory);
    return memory;
  }
  template <typename T>
  T* Upload(const std::vector<T>& values) {
    void* memory = Memory(static_cast<int64_t>(values.size() * sizeof(T)));
    NIBBLE_CUDA_CHECK(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<T*>(memory);
  }

  Device device_;
  std::vector<void*> memory_;
};

TEST_F(SiluTest, HasTheBitsOfLinearAndSiluMul) {
  auto cpu = CreateCpuOps({.threads = 2, .isa = std::nullopt});
  Staging staging(device_.stream);
  struct Case {
    int64_t rows, f, k;
  };
  for (const Case& c : {Case{1, 32, 128}, Case{5, 96, 384}, Case{33, 64, 640}, Case{130, 160, 256}, Case{300, 1536, 512}}) {
    SCOPED_TRACE(::testing::Message() << c.rows << " x " << c.f << " x " << c.k);
    const Projection gate = Random(c.f, c.k, 1), up = Random(c.f, c.k, 2);
    const W4View parts[] = {gate.View(), up.View()};
    std::mt19937 random(3);
    std::vector<int8_t> codes(c.rows * c.k);
    std::vector<int32_t> sums(c.rows);
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
      sums[i / c.k] += codes[i];
    }
    // Gates from far below to far above zero.
    std::vector<float> scales(c.rows);
    for (float& scale : scales) scale = std::ldexp(1.0f, -static_cast<int>(random() % 14));

    std::vector<BF16> gate_up(c.rows * 2 * c.f), want(c.rows * c.f);
    auto cpu_weight = cpu->PackW4(parts);
    ASSERT_TRUE(cpu_weight.ok());
    LinearInput input{.rows = c.rows, .k = c.k, .codes = codes.data(), .scales = scales.data(), .code_sums = sums.data()};
    const Rows both{gate_up.data(), DType::kBF16, c.rows, 2 * c.f};
    cpu->Linear({.input = input, .weight = cpu_weight->get(), .out = both});
    const InputCoding plain{.k = c.f};
    LinearInput h{.rows = c.rows, .k = c.f, .dense = {want.data(), DType::kBF16, c.rows, c.f}};
    cpu->SiluMulQuantize({.gate_up = both, .coding = &plain, .out = &h});

    auto weight = PackW4Ax(device_, staging, parts, {.interleave_gate_up = true});
    ASSERT_TRUE(weight.ok()) << weight.status();
    BF16* out = static_cast<BF16*>(Memory(c.rows * c.f * 2));
    LinearSiluMulW4Ax(device_, {.input = {.rows = c.rows,
                                          .k = c.k,
                                          .codes = Upload(codes),
                                          .scales = Upload(scales),
                                          .code_sums = Upload(sums)},
                                .weight = weight->get(),
                                .out = {out, DType::kBF16, c.rows, c.f}});
    std::vector<BF16> got(want.size());
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
    NIBBLE_CUDA_CHECK(cudaMemcpy(got.data(), out, got.size() * 2, cudaMemcpyDeviceToHost));
    int64_t wrong = 0, first = -1;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i].bits != want[i].bits && wrong++ == 0) first = static_cast<int64_t>(i);
    }
    EXPECT_EQ(wrong, 0) << "first at [" << first / c.f << ", " << first % c.f << "]: " << ToFloat(got[first]) << ", not "
                        << ToFloat(want[first]);
  }
}

}  // namespace
}  // namespace nibble::cuda
