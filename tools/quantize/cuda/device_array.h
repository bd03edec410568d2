// Device memory of the quantizer, counted: what a layer needs is part of what it reports.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace nibble::cuda {

// Bytes held now and the most ever held since it was last reset. One thread.
struct MemoryMeter {
  int64_t held = 0;
  int64_t peak = 0;
  void Add(int64_t bytes) {
    held += bytes;
    peak = std::max(peak, held);
  }
};

// `size` elements of device memory, contents undefined. The meter outlives it.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(meter_, other.meter_);
    return *this;
  }
  ~DeviceArray() {
    if (data_ == nullptr) return;
    cudaFree(data_);
    meter_->Add(-size_ * static_cast<int64_t>(sizeof(T)));
  }

  // RESOURCE_EXHAUSTED with what was asked for and what is free.
  static absl::StatusOr<DeviceArray> Allocate(int64_t size, MemoryMeter* meter) {
    DeviceArray out;
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (cudaMalloc(reinterpret_cast<void**>(&out.data_), std::max<size_t>(bytes, 1)) != cudaSuccess) {
      cudaGetLastError();  // the failed allocation is dealt with here
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      return absl::ResourceExhaustedError(
          absl::StrCat("the GPU has ", free, " bytes free of ", total, ", the quantizer needs ", bytes, " more"));
    }
    out.size_ = size;
    out.meter_ = meter;
    meter->Add(static_cast<int64_t>(bytes));
    return out;
  }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  bool empty() const { return data_ == nullptr; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
  MemoryMeter* meter_ = nullptr;
};

}  // namespace nibble::cuda
