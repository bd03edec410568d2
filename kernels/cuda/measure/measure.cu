#include "kernels/cuda/measure/measure.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/measure/matmul.h"

namespace nibble::cuda {
namespace {

struct Stamp {
  int64_t cycles = 0, ns = 0;
};

// What a multiprocessor's own counter and the device's say. One block for each, and every one gets one while all are idle.
__global__ void StampKernel(Stamp* stamps) {
  uint32_t multiprocessor;
  int64_t ns;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  const int64_t cycles = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  stamps[multiprocessor] = {cycles, ns};
}

__global__ void ReadKernel(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t all = 0;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint4 x = __ldcs(data + i);
    all |= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (all == 1) *sink = all;  // never: memory is zero
}

class DeviceMeasure final : public Measure {
 public:
  DeviceMeasure(int ordinal, cudaStream_t stream) : stream_(stream) {
    cudaDeviceProp properties;
    NIBBLE_CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
    int driver = 0, runtime = 0;
    NIBBLE_CUDA_CHECK(cudaDriverGetVersion(&driver));
    NIBBLE_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    facts_ = {.name = properties.name,
              .capability = properties.major * 10 + properties.minor,
              .multiprocessors = properties.multiProcessorCount,
              .l2_bytes = properties.l2CacheSize,
              .driver = absl::StrCat(driver / 1000, ".", driver % 1000 / 10),
              .runtime = absl::StrCat(runtime / 1000, ".", runtime % 1000 / 10)};
    NIBBLE_CUDA_CHECK(cudaMalloc(&stamps_, 2 * StampBytes()));
    NIBBLE_CUDA_CHECK(cudaEventCreate(&begin_));
    NIBBLE_CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~DeviceMeasure() override {
    (void)cudaEventDestroy(begin_);
    (void)cudaEventDestroy(end_);
    (void)cudaFree(stamps_);
  }

  const DeviceFacts& facts() const override { return facts_; }

  Measured Replay(int launches, int replays, const std::function<void(int)>& issue) override {
    issue(0);
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    NIBBLE_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) issue(i);
    NIBBLE_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    NIBBLE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, stream_));
    std::vector<double> us;
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(stamps_, 0, 2 * StampBytes(), stream_));
    for (int i = 0; i < replays; ++i) {
      const bool last = i == replays - 1;
      if (last) StampKernel<<<facts_.multiprocessors, 1, 0, stream_>>>(stamps_);
      NIBBLE_CUDA_CHECK(cudaEventRecord(begin_, stream_));
      NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, stream_));
      NIBBLE_CUDA_CHECK(cudaEventRecord(end_, stream_));
      if (last) StampKernel<<<facts_.multiprocessors, 1, 0, stream_>>>(stamps_ + facts_.multiprocessors);
      NIBBLE_CUDA_CHECK(cudaEventSynchronize(end_));
      float ms = 0;
      NIBBLE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
      us.push_back(1e3 * ms / launches);
    }
    NIBBLE_CUDA_CHECK(cudaGraphExecDestroy(executable));
    NIBBLE_CUDA_CHECK(cudaGraphDestroy(graph));
    std::sort(us.begin(), us.end());
    const double median = us[us.size() / 2];
    return {.us = median,
            .spread = (us.back() - us.front()) / median,
            .clock_mhz = ClockOfLastReplay()};
  }

  double ReadBandwidth() override {
    if (bandwidth_ != 0) return bandwidth_;
    constexpr int64_t kBytes = int64_t{4} << 30;
    void* data = nullptr;
    if (cudaMalloc(&data, kBytes) != cudaSuccess) {
      (void)cudaGetLastError();
      return 0;
    }
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(data, 0, kBytes, stream_));
    const unsigned blocks = static_cast<unsigned>(facts_.multiprocessors) * 16;
    const Measured read = Replay(2, 5, [&](int) {
      ReadKernel<<<blocks, 512, 0, stream_>>>(static_cast<const uint4*>(data), kBytes / 16,
                                              reinterpret_cast<uint32_t*>(stamps_));
    });
    NIBBLE_CUDA_CHECK(cudaFree(data));
    return bandwidth_ = static_cast<double>(kBytes) / read.us * 1e6;
  }

  Measured Matmul(MatmulType type, int64_t n, int64_t k, int64_t rows, int replays) override {
    CublasMatmul matmul(type, n, k, rows, facts_.l2_bytes, stream_);
    // As many launches as take a few milliseconds.
    const double us = static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(rows) / 3e8;
    const int launches = us > 500 ? 6 : 20;
    Measured best;
    for (int i = 0; i < matmul.proposals(); ++i) {
      if (!matmul.Works(i)) continue;
      const Measured measured = Replay(launches, replays, [&](int launch) { matmul.Issue(i, launch); });
      if (best.us == 0 || measured.us < best.us) best = measured;
    }
    return best;
  }

 private:
  size_t StampBytes() const { return static_cast<size_t>(facts_.multiprocessors) * sizeof(Stamp); }

  // MHz, mean over the last replay and median over the multiprocessors that were stamped before and after it.
  double ClockOfLastReplay() {
    std::vector<Stamp> stamps(2 * static_cast<size_t>(facts_.multiprocessors));
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(stamps.data(), stamps_, 2 * StampBytes(), cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    std::vector<double> mhz;
    for (int i = 0; i < facts_.multiprocessors; ++i) {
      const Stamp &before = stamps[i], &after = stamps[facts_.multiprocessors + i];
      if (before.ns == 0 || after.ns <= before.ns) continue;
      mhz.push_back(1e3 * static_cast<double>(after.cycles - before.cycles) / static_cast<double>(after.ns - before.ns));
    }
    if (mhz.empty()) return 0;
    std::nth_element(mhz.begin(), mhz.begin() + mhz.size() / 2, mhz.end());
    return mhz[mhz.size() / 2];
  }

  cudaStream_t stream_;
  DeviceFacts facts_;
  Stamp* stamps_ = nullptr;  // of every multiprocessor, before and after a replay
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  double bandwidth_ = 0;
};

}  // namespace

double Measure::MatrixRate(MatmulType type, double clock_mhz) const {
  // int8 operations of a multiprocessor in a cycle, from NVIDIA's architecture papers; bf16 does half, fp8 as many as
  // int8 where there is fp8.
  const DeviceFacts& f = facts();
  const double per_cycle = f.capability == 90 ? 8192 : f.capability == 80 ? 4096 : f.capability == 89 ? 2048 : 0;
  return per_cycle * (type == MatmulType::kBF16 ? 0.5 : 1) * f.multiprocessors * clock_mhz * 1e6;
}

absl::StatusOr<std::unique_ptr<Measure>> CreateMeasure(Ops& ops) {
  const Device* device = DeviceOf(ops);
  if (device == nullptr) return absl::InvalidArgumentError("only the CUDA backend can be measured on a GPU");
  return std::make_unique<DeviceMeasure>(device->ordinal, device->stream);
}

}  // namespace nibble::cuda
