// What every CUDA operator is launched with: the device, its stream and scratch memory.
//
// Launches overlap by programmatic dependent launch: a kernel started with Launch() may begin while the kernel before
// it still runs. So every kernel calls GridDependencyWait() (ptx/launch.h) before it touches anything that an earlier
// kernel on the stream writes, and before it writes anything that an earlier kernel may read. Weights may be read
// before it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/base/check.h"

namespace nibble::cuda {

// A failed CUDA call is a dead device or a bug; both end the process with the place and the error's name.
#define NIBBLE_CUDA_CHECK(call)                                                                   \
  do {                                                                                            \
    const cudaError_t nibble_error = (call);                                                      \
    NIBBLE_CHECK(nibble_error == cudaSuccess,                                                     \
                 std::string(#call) + ": " + cudaGetErrorName(nibble_error) + ", " + cudaGetErrorString(nibble_error)); \
  } while (false)

struct Device {
  int ordinal = 0;
  int capability = 0;              // 80, 86, 89, 90
  int multiprocessors = 0;
  int64_t shared_bytes = 0;        // per block, opt-in limit
  int64_t l2_bytes = 0;
  cudaStream_t stream = nullptr;
  // Scratch of one operator, free to be overwritten by the next one; see cuda_ops.h for who sizes it.
  uint8_t* scratch = nullptr;
  int64_t scratch_bytes = 0;

  // `bytes` of scratch memory, 256-byte aligned; a bug when the operator needs more than its plan announced.
  template <typename T>
  T* Scratch(int64_t bytes) const {
    NIBBLE_CHECK(bytes <= scratch_bytes, "an operator needs " + std::to_string(bytes) + " bytes of scratch, the device has " +
                                             std::to_string(scratch_bytes));
    return reinterpret_cast<T*>(scratch);
  }
};

// Starts kernel<<<grid, block, shared_bytes>>> on the device's stream with programmatic dependent launch.
template <typename... Parameters, typename... Arguments>
void Launch(const Device& device, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
            Arguments&&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = device.stream;
  config.attrs = &overlap;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  NIBBLE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace nibble::cuda
