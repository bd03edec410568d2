// Copies between host memory that is not pinned and the device, through pinned memory, in the order of a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace nibble::cuda {

// Used by one thread at a time. Errors are the CUDA runtime's; after one, nothing more is copied.
class Staging {
 public:
  // Pinned memory and events on the calling thread's device.
  explicit Staging(cudaStream_t stream);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // `from` may be reused at once; the copy itself is only queued.
  cudaError_t Upload(void* to, const void* from, size_t bytes);
  // Waits for everything queued before.
  cudaError_t Download(void* to, const void* from, size_t bytes);

 private:
  // Uploads fill one part while the copies out of the other are under way.
  static constexpr size_t kPartBytes = size_t{8} << 20;
  struct Part {
    uint8_t* memory = nullptr;
    size_t used = 0;
    cudaEvent_t copied = nullptr;
  };

  const cudaStream_t stream_;
  Part parts_[2];
  int filling_ = 0;
  uint8_t* download_ = nullptr;
};

}  // namespace nibble::cuda
