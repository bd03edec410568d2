// Pinned host memory and its counterpart on the GPU: bf16 values on their way to a product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "tools/quantize/cuda/device_array.h"
#include "tools/quantize/cuda/gpu.h"

namespace nibble::cuda {

inline constexpr int64_t kStageElements = int64_t{32} << 20;

// Prepare, fill host(), Upload, queue work on device(), Release; then Prepare waits for that work.
class Stage {
 public:
  Stage() = default;
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage() {
    if (host_ == nullptr) return;
    cudaEventSynchronize(done_);
    cudaEventDestroy(done_);
    cudaFreeHost(host_);
  }

  // Memory is taken at the first call: RESOURCE_EXHAUSTED where there is none.
  absl::Status Prepare(Gpu* gpu) {
    if (host_ != nullptr) {
      NIBBLE_CUDA_CHECK(cudaEventSynchronize(done_));
      return absl::OkStatus();
    }
    NIBBLE_ASSIGN_OR_RETURN(device_, gpu->Allocate<uint16_t>(kStageElements));
    if (cudaMallocHost(reinterpret_cast<void**>(&host_), kStageElements * sizeof(uint16_t)) != cudaSuccess) {
      cudaGetLastError();  // the failed allocation is dealt with here
      host_ = nullptr;
      return absl::ResourceExhaustedError(
          absl::StrCat("no ", kStageElements * sizeof(uint16_t), " bytes of pinned host memory"));
    }
    NIBBLE_CUDA_CHECK(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
    return absl::OkStatus();
  }

  uint16_t* host() const { return host_; }
  const uint16_t* device() const { return device_.data(); }
  void Upload(const Gpu& gpu, int64_t count) const {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(device_.data(), host_, static_cast<size_t>(count) * sizeof(uint16_t),
                                      cudaMemcpyHostToDevice, gpu.stream()));
  }
  void Release(const Gpu& gpu) const { NIBBLE_CUDA_CHECK(cudaEventRecord(done_, gpu.stream())); }

 private:
  DeviceArray<uint16_t> device_;
  uint16_t* host_ = nullptr;
  cudaEvent_t done_ = nullptr;
};

}  // namespace nibble::cuda
