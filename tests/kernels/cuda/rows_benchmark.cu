// nibble_rows_benchmark: times the row operators on a GPU. For each: microseconds, bytes moved per second and their
// share of the rate at which an H200 reads memory. A graph of launches over buffers that do not fit into the L2
// together, median of its replays; the SM clock is measured after each.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/rows/rows.h"

namespace nibble::cuda {
namespace {

constexpr double kHbmGBps = 4550;
constexpr int64_t kRotatedBytes = 400 << 20;
constexpr int kMaxLaunches = 64, kReplays = 15;

__global__ void FillRandom(uint16_t* data, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0;
    for (uint32_t j = 0; j < 4; ++j) {
      uint32_t x = static_cast<uint32_t>(i) * 4 + j + seed;
      x = (x ^ (x >> 16)) * 0x7feb352du;
      x = (x ^ (x >> 15)) * 0x846ca68bu;
      sum += static_cast<float>(x ^ (x >> 16)) * 0x1p-32f - 0.5f;
    }
    data[i] = static_cast<uint16_t>(__float_as_uint(sum * 2) >> 16);
  }
}

__global__ void ReadClock(int64_t* cycles_and_ns) {
  const auto now = [] {
    int64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
  };
  const int64_t ns = now(), cycles = clock64();
  while (now() - ns < 50000) continue;
  cycles_and_ns[0] = clock64() - cycles;
  cycles_and_ns[1] = now() - ns;
}

template <typename T>
T* NewArray(int64_t count) {
  T* data = nullptr;
  NIBBLE_CUDA_CHECK(cudaMalloc(&data, count * sizeof(T)));
  NIBBLE_CUDA_CHECK(cudaMemset(data, 0x5a, count * sizeof(T)));
  return data;
}

class Benchmark {
 public:
  explicit Benchmark(const Device& device) : device_(device), clock_(NewArray<int64_t>(2)) {}

  // launch(i) runs on the i-th set of buffers; a set is read or written `bytes` bytes by one launch.
  void Time(const char* name, int64_t rows, int64_t bytes, int64_t sets, const std::function<void(int64_t)>& launch) {
    const int launches = static_cast<int>(std::min<int64_t>(kMaxLaunches, std::max<int64_t>(sets, 8)));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    NIBBLE_CUDA_CHECK(cudaStreamBeginCapture(device_.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) launch(i % sets);
    NIBBLE_CUDA_CHECK(cudaStreamEndCapture(device_.stream, &graph));
    NIBBLE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    NIBBLE_CUDA_CHECK(cudaEventCreate(&begin));
    NIBBLE_CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> us;
    for (int i = 0; i < kReplays + 2; ++i) {
      NIBBLE_CUDA_CHECK(cudaEventRecord(begin, device_.stream));
      NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, device_.stream));
      NIBBLE_CUDA_CHECK(cudaEventRecord(end, device_.stream));
      NIBBLE_CUDA_CHECK(cudaEventSynchronize(end));
      float ms = 0;
      NIBBLE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 2) us.push_back(ms * 1e3f / static_cast<float>(launches));
    }
    std::sort(us.begin(), us.end());
    ReadClock<<<1, 1, 0, device_.stream>>>(clock_);
    int64_t clock[2];
    NIBBLE_CUDA_CHECK(cudaMemcpy(clock, clock_, sizeof(clock), cudaMemcpyDeviceToHost));
    const double median = us[us.size() / 2], gbps = static_cast<double>(bytes) / median / 1e3;
    std::printf("%-34s %5ld rows %8.2f us (%.2f..%.2f) %6.0f GB/s %5.1f %%  %4.0f MHz\n", name, rows, median, us.front(),
                us.back(), gbps, 100 * gbps / kHbmGBps, 1e3 * static_cast<double>(clock[0]) / static_cast<double>(clock[1]));
    NIBBLE_CUDA_CHECK(cudaGraphExecDestroy(executable));
    NIBBLE_CUDA_CHECK(cudaGraphDestroy(graph));
  }

 private:
  const Device& device_;
  int64_t* clock_;
};

// Inputs and outputs of `sets` launches of `rows` rows.
struct Case {
  const char* name;
  int64_t k;
  bool wide;          // all blocks 8-bit, else one in ten
  bool perm;
  int64_t hadamard;
};

void Run(const Device& device, Benchmark& benchmark, const Case& c, int64_t rows, bool silu) {
  const int64_t blocks = c.k / kBlock, in_cols = silu ? 2 * c.k : c.k;
  const int64_t bytes = rows * (silu ? 4 * c.k + c.k : 3 * 2 * c.k + c.k) + rows * (blocks + 8);
  const int64_t sets = std::max<int64_t>(1, std::min<int64_t>(kMaxLaunches, kRotatedBytes / (rows * in_cols * 2) + 1));
  std::vector<uint8_t> bits(blocks);
  for (int64_t b = 0; b < blocks; ++b) bits[b] = c.wide || b % 10 == 0 ? 8 : 4;
  std::vector<int32_t> perm(c.k);
  for (int64_t i = 0; i < c.k; ++i) perm[i] = static_cast<int32_t>(i * 4099 % c.k);  // 4099 is prime
  uint8_t* device_bits = NewArray<uint8_t>(blocks);
  int32_t* device_perm = NewArray<int32_t>(c.k);
  NIBBLE_CUDA_CHECK(cudaMemcpy(device_bits, bits.data(), blocks, cudaMemcpyHostToDevice));
  NIBBLE_CUDA_CHECK(cudaMemcpy(device_perm, perm.data(), c.k * 4, cudaMemcpyHostToDevice));
  const int64_t count = sets * rows * in_cols;
  uint16_t *in = NewArray<uint16_t>(count), *delta = NewArray<uint16_t>(silu ? 1 : count), *weight = NewArray<uint16_t>(c.k);
  FillRandom<<<1024, 256, 0, device.stream>>>(in, count, 1);
  if (!silu) FillRandom<<<1024, 256, 0, device.stream>>>(delta, count, 2);
  FillRandom<<<64, 256, 0, device.stream>>>(weight, c.k, 3);
  int8_t* codes = NewArray<int8_t>(sets * rows * c.k);
  uint8_t* exponents = NewArray<uint8_t>(sets * rows * blocks);
  float* scales = NewArray<float>(rows);
  int32_t* sums = NewArray<int32_t>(rows);
  NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));

  const InputCoding coding = {.k = c.k,
                              .quantized = true,
                              .block_bits = device_bits,
                              .perm = c.perm ? device_perm : nullptr,
                              .hadamard = c.hadamard};
  const RowPlan plan =
      PlanRow({.rows = rows, .k = c.k, .norm = !silu, .quantized = true, .hadamard = c.hadamard, .perm = c.perm},
              device.capability, device.shared_bytes, device.multiprocessors)
          .value();
  benchmark.Time(c.name, rows, bytes, sets, [&](int64_t i) {
    LinearInput out = {.rows = rows,
                       .k = c.k,
                       .codes = codes + i * rows * c.k,
                       .scales = scales,
                       .code_sums = sums,
                       .exponents = exponents + i * rows * blocks};
    const auto at = [&](uint16_t* data) { return Rows{data + i * rows * in_cols, DType::kBF16, rows, in_cols}; };
    if (silu) {
      SiluMulQuantize(device, {.gate_up = at(in), .coding = &coding, .out = &out}, plan);
      return;
    }
    const Rows delta_rows = at(delta);
    AddNormQuantize(device,
                    {.residual = at(in),
                     .delta = &delta_rows,
                     .weight = reinterpret_cast<const BF16*>(weight),
                     .eps = 1e-5f,
                     .coding = &coding,
                     .out = &out},
                    plan);
  });
  for (void* data : {static_cast<void*>(device_bits), static_cast<void*>(device_perm), static_cast<void*>(in),
                     static_cast<void*>(delta), static_cast<void*>(weight), static_cast<void*>(codes),
                     static_cast<void*>(exponents), static_cast<void*>(scales), static_cast<void*>(sums)}) {
    NIBBLE_CUDA_CHECK(cudaFree(data));
  }
}

int Main() {
  auto opened = OpenDevice(0);
  if (!opened.ok()) {
    std::fprintf(stderr, "%s\n", opened.status().ToString().c_str());
    return 1;
  }
  Device device = *opened;
  NIBBLE_CUDA_CHECK(cudaStreamCreate(&device.stream));
  std::printf("%s\n", DeviceName(0).c_str());
  Benchmark benchmark(device);
  constexpr Case kNorms[] = {{"add+norm+quantize A4 8192", 8192, false, false, 0},
                             {"add+norm+quantize A8 8192", 8192, true, false, 0},
                             {"add+norm+permute+quantize A4 8192", 8192, false, true, 0},
                             {"add+norm+quantize A4 4096", 4096, false, false, 0}};
  constexpr Case kSilus[] = {{"silu*up+quantize A4 28672", 28672, false, false, 0},
                             {"silu*up+quantize A8 28672", 28672, true, false, 0},
                             {"silu*up+hadamard+quantize A4 28672", 28672, false, false, 512},
                             {"silu*up+permute+quantize A4 28672", 28672, false, true, 0},
                             {"silu*up+quantize A4 14336", 14336, false, false, 0}};
  for (int64_t rows : {1, 32, 128, 1024, 4096}) {
    for (const Case& c : kNorms) Run(device, benchmark, c, rows, false);
    for (const Case& c : kSilus) Run(device, benchmark, c, rows, true);
  }
  return 0;
}

}  // namespace
}  // namespace nibble::cuda

int main() { return nibble::cuda::Main(); }
