// W4Ax linear layers for sm_80 to sm_89 against the CPU specification, bit for bit. This program holds the kernels as
// PTX for compute_80, which the driver compiles for the device at hand: also for one that only emulates 4-bit tensor
// cores, where the results are the same and the speed means nothing.
#include <algorithm>
#include <array>
#include <cstring>
#include <random>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cuda/gemm_sm80/gemm.h"
#include "kernels/cuda/gemm_sm80/plan.h"
#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

using cuda::Device;

struct Case {
  int64_t rows, n, k;
  int eight_bit_percent;  // of the blocks
  bool bias = false;
  DType out = DType::kBF16;
  bool extreme = false;  // all codes at the ends of their range
};

std::string Name(const Case& c) {
  return std::to_string(c.rows) + "x" + std::to_string(c.n) + "x" + std::to_string(c.k) + " with " +
         std::to_string(c.eight_bit_percent) + " % 8-bit blocks" + (c.extreme ? ", extreme" : "");
}

struct Tensors {
  std::vector<uint8_t> qweight, group_scale, block_bits, exponents;
  std::vector<int8_t> group_min, codes;
  std::vector<float> channel_scale, scales, bias;
  std::vector<int32_t> code_sums;

  explicit Tensors(const Case& c) {
    std::mt19937 random(static_cast<uint32_t>(c.rows * 7 + c.n * 3 + c.k + c.eight_bit_percent));
    const int64_t blocks = c.k / kBlock;
    qweight.resize(c.n * c.k / 2);
    for (uint8_t& x : qweight) x = c.extreme || random() % 8 == 0 ? 0xff : static_cast<uint8_t>(random());
    for (int64_t i = 0; i < c.n * blocks; ++i) {
      const int scale = c.extreme ? 16 : 1 + static_cast<int>(random() % 16), most = std::min(119, 127 - 15 * scale);
      group_scale.push_back(static_cast<uint8_t>(scale));
      group_min.push_back(static_cast<int8_t>(c.extreme ? (i % 2 == 0 ? most : -119)
                                                        : static_cast<int>(random() % (most + 120)) - 119));
    }
    for (int64_t i = 0; i < c.n; ++i) {
      channel_scale.push_back(0.001f + 0.0001f * static_cast<float>(random() % 100));
      if (c.bias) bias.push_back(static_cast<float>(random() % 1000) - 500.0f);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      block_bits.push_back(static_cast<int>(random() % 100) < c.eight_bit_percent ? 8 : 4);
    }
    for (int64_t t = 0; t < c.rows; ++t) {
      scales.push_back(t % 5 == 4 ? 0.0f : 0.001f * static_cast<float>(1 + random() % 50));
      int32_t sum = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const bool four = block_bits[b] == 4;
        const int exponent = four ? (c.extreme ? 4 : static_cast<int>(random() % 5)) : 0;
        const int most = four ? 7 : 127;
        const bool extreme = c.extreme || random() % 8 == 0;
        const int sign = random() % 2 == 0 ? 1 : -1;
        exponents.push_back(static_cast<uint8_t>(exponent));
        for (int64_t i = 0; i < kBlock; ++i) {
          const int mantissa = extreme ? sign * most : static_cast<int>(random() % (2 * most + 1)) - most;
          codes.push_back(static_cast<int8_t>(mantissa * (1 << exponent)));
          sum += codes.back();
        }
      }
      code_sums.push_back(sum);
    }
  }

  W4View View(int64_t begin, int64_t n, int64_t k) const {
    const int64_t blocks = k / kBlock;
    return {.n = n,
            .k = k,
            .qweight = qweight.data() + begin * k / 2,
            .group_scale = group_scale.data() + begin * blocks,
            .group_min = group_min.data() + begin * blocks,
            .channel_scale = channel_scale.data() + begin,
            .block_bits = block_bits.data()};
  }
};

class GemmSm80Test : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return;
    device_ = new Device;
    NIBBLE_CUDA_CHECK(cudaSetDevice(0));
    NIBBLE_CUDA_CHECK(cudaStreamCreateWithFlags(&device_->stream, cudaStreamNonBlocking));
    // Kernels compiled for compute_80 do not order themselves after the one before, so no launch may overlap: a device
    // that says 8.0 is launched to without it.
    device_->capability = 80;
    device_->multiprocessors = 108;
    device_->scratch_bytes = cuda::sm80::LinearW4AxScratchBytes(28672, 4096, device_->multiprocessors);
    NIBBLE_CUDA_CHECK(cudaMalloc(&device_->scratch, device_->scratch_bytes));
    NIBBLE_CUDA_CHECK(cudaMemset(device_->scratch, 0xff, device_->scratch_bytes));
  }
  void SetUp() override {
    if (device_ == nullptr) GTEST_SKIP() << "no CUDA device";
  }

  template <typename T>
  static T* Copy(const std::vector<T>& from, std::vector<Buffer>* owner) {
    if (from.empty()) return nullptr;
    void* data = nullptr;
    NIBBLE_CUDA_CHECK(cudaMalloc(&data, from.size() * sizeof(T)));
    NIBBLE_CUDA_CHECK(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    owner->emplace_back(data, from.size() * sizeof(T), [](void* p) { cudaFree(p); });
    return static_cast<T*>(data);
  }

  // The output with a row of poison before and after, which must stay.
  static std::vector<uint8_t> OnGpu(const Case& c, const Tensors& t, int64_t first, int64_t rows) {
    cuda::Staging staging(device_->stream);
    // Two projections stacked at a row that no tile begins with.
    const int64_t split = c.n > 8 ? c.n / 2 | 1 : c.n;
    std::vector<W4View> parts = {t.View(0, split, c.k)};
    if (split < c.n) parts.push_back(t.View(split, c.n - split, c.k));
    auto weight = cuda::sm80::PackW4Ax(*device_, staging, parts);
    EXPECT_TRUE(weight.ok()) << weight.status();
    std::vector<Buffer> owner;
    const int64_t row_bytes = c.n * SizeOf(c.out), guard = (row_bytes + 255) / 256 * 256;
    uint8_t* out = Copy(std::vector<uint8_t>(2 * guard + rows * row_bytes, 0xff), &owner);
    cuda::sm80::LinearW4Ax(*device_,
                           {.input = {.rows = rows,
                                      .k = c.k,
                                      .codes = Copy(t.codes, &owner) + first * c.k,
                                      .scales = Copy(t.scales, &owner) + first,
                                      .exponents = Copy(t.exponents, &owner) + first * (c.k / kBlock)},
                            .weight = weight->get(),
                            .bias = Copy(t.bias, &owner),
                            .out = {.data = out + guard, .dtype = c.out, .rows = rows, .cols = c.n}});
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device_->stream));
    std::vector<uint8_t> bytes(2 * guard + rows * row_bytes);
    NIBBLE_CUDA_CHECK(cudaMemcpy(bytes.data(), out, bytes.size(), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < guard; ++i) {
      EXPECT_EQ(bytes[i], 0xff) << guard - i << " bytes before the output";
      EXPECT_EQ(bytes[bytes.size() - 1 - i], 0xff) << guard - i << " bytes past the output";
    }
    return {bytes.begin() + guard, bytes.end() - guard};
  }

  static std::vector<uint8_t> Specified(const Case& c, const Tensors& t) {
    auto cpu = CreateCpuOps({.threads = 4, .isa = std::nullopt});
    const W4View view = t.View(0, c.n, c.k);
    auto weight = cpu->PackW4({&view, 1});
    EXPECT_TRUE(weight.ok()) << weight.status();
    std::vector<uint8_t> out(c.rows * c.n * SizeOf(c.out));
    Tensors input = t;
    cpu->Linear({.input = {.rows = c.rows,
                           .k = c.k,
                           .codes = input.codes.data(),
                           .scales = input.scales.data(),
                           .code_sums = input.code_sums.data(),
                           .exponents = input.exponents.data()},
                 .weight = weight->get(),
                 .bias = c.bias ? input.bias.data() : nullptr,
                 .out = {.data = out.data(), .dtype = c.out, .rows = c.rows, .cols = c.n}});
    return out;
  }

  static Device* device_;
};
Device* GemmSm80Test::device_ = nullptr;

TEST_F(GemmSm80Test, EqualsTheSpecification) {
  const Case cases[] = {
      // One kind of block, one tile.
      {1, 8, 128, 0},
      {1, 8, 128, 100},
      {16, 128, 256, 0, false, DType::kF32},
      {16, 128, 256, 100, false, DType::kF32},
      // Ragged rows, channels and kinds; every configuration.
      {3, 130, 384, 50, true},
      {17, 64, 1024, 30, true, DType::kF32},
      {31, 1000, 768, 25},
      {33, 129, 4224, 20, true},
      {64, 392, 2048, 15, false, DType::kF32},
      {65, 1280, 1152, 40},
      {100, 257, 640, 10, true, DType::kF32},
      {127, 512, 1024, 100, true},
      {128, 1024, 1024, 0, true},
      {129, 1536, 896, 16},
      {300, 1030, 512, 50},
      // More tiles than multiprocessors; more rows than a launch takes.
      {200, 8192, 1024, 20},
      {2100, 640, 256, 50, true},
      // The sums' ends: all products of one sign.
      {5, 136, 28672, 0, false, DType::kF32, true},
      {5, 136, 28672, 100, false, DType::kF32, true},
      {40, 256, 8192, 20, false, DType::kF32, true},
      // Of Llama-3: qkv of an eighth, down of an eighth.
      {7, 1280, 8192, 16},
      {96, 1280, 8192, 16},
      {48, 8192, 3584, 12},
  };
  for (const Case& c : cases) {
    const Tensors t(c);
    const std::vector<uint8_t> want = Specified(c, t), got = OnGpu(c, t, 0, c.rows);
    ASSERT_EQ(got.size(), want.size());
    const auto wrong = std::mismatch(got.begin(), got.end(), want.begin());
    const int64_t at = (wrong.first - got.begin()) / SizeOf(c.out);
    ASSERT_EQ(wrong.first, got.end()) << Name(c) << ": first difference at [" << at / c.n << ", " << at % c.n << "]";
  }
}

TEST_F(GemmSm80Test, RowsDoNotDependOnTheBatch) {
  const Case c = {.rows = 300, .n = 200, .k = 1024, .eight_bit_percent = 25, .out = DType::kF32};
  const Tensors t(c);
  const std::vector<uint8_t> all = OnGpu(c, t, 0, c.rows);
  const int64_t row_bytes = c.n * SizeOf(c.out);
  for (const auto& [first, rows] : {std::pair<int64_t, int64_t>{5, 1}, {5, 7}, {0, 64}, {290, 10}}) {
    EXPECT_EQ(OnGpu(c, t, first, rows),
              std::vector<uint8_t>(all.begin() + first * row_bytes, all.begin() + (first + rows) * row_bytes))
        << rows << " rows from " << first;
  }
}

using GemmSm80DeathTest = GemmSm80Test;  // in a process of its own, whose device a trap may end

TEST_F(GemmSm80DeathTest, CodesThatAreNoMantissasTrap) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Case c = {.rows = 2, .n = 16, .k = 256, .eight_bit_percent = 0};
  Tensors t(c);
  t.codes[300] = 3;
  t.exponents[c.k / kBlock] = 1;  // 3 is not a multiple of 2
  EXPECT_DEATH((void)OnGpu(c, t, 0, c.rows), "cudaStreamSynchronize");
}

}  // namespace
}  // namespace nibble::testing
