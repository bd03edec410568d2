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
#include <string>

#include "absl/status/statusor.h"
#include "common/base/check.h"
#include "kernels/ops.h"

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

// Looks at device `ordinal` and makes it the calling thread's; no stream and no scratch yet. UNAVAILABLE, saying what
// is there and what is needed, when the driver is too old, the machine has no such device, or this build has no
// kernels for it.
absl::StatusOr<Device> OpenDevice(int ordinal);

// Zeroed memory on the calling thread's device, cleared in the order of device.stream. RESOURCE_EXHAUSTED with the
// bytes and what they are for.
absl::StatusOr<Buffer> AllocateDevice(const Device& device, int64_t bytes, const char* purpose);

// "NVIDIA H200, compute capability 9.0".
std::string DeviceName(int ordinal);

// An error after which every call on the device fails until the process ends: a kernel trapped, read outside its
// memory, or the device is lost. The next Synchronize reports it, so launches after it are let pass.
bool IsSticky(cudaError_t error);

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
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (!IsSticky(launched)) NIBBLE_CUDA_CHECK(launched);
}

// Lets a kernel be launched with that much dynamic shared memory; more than the default needs permission.
template <typename Kernel>
void AllowSharedMemory(Kernel* kernel, int64_t shared_bytes) {
  constexpr int64_t kWithoutPermission = 48 << 10;
  if (shared_bytes <= kWithoutPermission) return;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (!IsSticky(allowed)) NIBBLE_CUDA_CHECK(allowed);
}

}  // namespace nibble::cuda
