#include "kernels/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/device.h"

namespace nibble::cuda {
namespace {

constexpr size_t kDownloadBytes = size_t{2} << 20;
constexpr size_t kAlignment = 64;

}  // namespace

Staging::Staging(cudaStream_t stream) : stream_(stream) {
  for (Part& part : parts_) {
    NIBBLE_CUDA_CHECK(cudaMallocHost(&part.memory, kPartBytes));
    NIBBLE_CUDA_CHECK(cudaEventCreateWithFlags(&part.copied, cudaEventDisableTiming));
  }
  NIBBLE_CUDA_CHECK(cudaMallocHost(&download_, kDownloadBytes));
}

// A lost device makes these fail, and then there is nothing to give back.
Staging::~Staging() {
  for (Part& part : parts_) {
    (void)cudaEventDestroy(part.copied);
    (void)cudaFreeHost(part.memory);
  }
  (void)cudaFreeHost(download_);
}

cudaError_t Staging::Upload(void* to, const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    Part& part = parts_[filling_];
    if (part.used >= kPartBytes) {
      if (const cudaError_t error = cudaEventRecord(part.copied, stream_); error != cudaSuccess) return error;
      filling_ ^= 1;
      if (const cudaError_t error = cudaEventSynchronize(parts_[filling_].copied); error != cudaSuccess) return error;
      parts_[filling_].used = 0;
      continue;
    }
    const size_t count = std::min(bytes - done, kPartBytes - part.used);
    std::memcpy(part.memory + part.used, static_cast<const uint8_t*>(from) + done, count);
    const cudaError_t error = cudaMemcpyAsync(static_cast<uint8_t*>(to) + done, part.memory + part.used, count,
                                              cudaMemcpyHostToDevice, stream_);
    if (error != cudaSuccess) return error;
    part.used += (count + kAlignment - 1) / kAlignment * kAlignment;
    done += count;
  }
  return cudaSuccess;
}

cudaError_t Staging::Download(void* to, const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t count = std::min(bytes - done, kDownloadBytes);
    cudaError_t error =
        cudaMemcpyAsync(download_, static_cast<const uint8_t*>(from) + done, count, cudaMemcpyDeviceToHost, stream_);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);
    if (error != cudaSuccess) return error;
    std::memcpy(static_cast<uint8_t*>(to) + done, download_, count);
    done += count;
  }
  return cudaSuccess;
}

}  // namespace nibble::cuda
