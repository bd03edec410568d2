#include "kernels/cuda/device.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace nibble::cuda {
namespace {

// Compute capabilities that this build has machine code for, from tools/cmake/NibbleCuda.cmake: 80, 89, 90.
constexpr int kBuiltFor[] = {NIBBLE_CUDA_CAPABILITIES};

std::string Dotted(int capability) { return absl::StrCat(capability / 10, ".", capability % 10); }

// Machine code runs on its own capability and on later ones of the same major number; that of 9.0 uses instructions
// that only 9.0 has.
bool RunsOn(int built, int capability) {
  return built == capability || (built / 10 == 8 && capability / 10 == 8 && built <= capability);
}

std::string VersionString(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

}  // namespace

absl::StatusOr<Device> OpenDevice(int ordinal) {
  int count = 0, driver = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver) {
    (void)cudaDriverGetVersion(&driver);
    return absl::UnavailableError(
        driver == 0 ? std::string("backend is cuda, but this machine has no NVIDIA driver")
                    : absl::StrCat("backend is cuda, but the NVIDIA driver supports CUDA ", VersionString(driver),
                                   " and this build needs ", VersionString(CUDART_VERSION)));
  }
  if (found == cudaErrorNoDevice || (found == cudaSuccess && count == 0)) {
    return absl::UnavailableError("backend is cuda, but this machine has no CUDA device");
  }
  if (found != cudaSuccess) {
    return absl::UnavailableError(absl::StrCat("backend is cuda, but looking for devices failed: ",
                                               cudaGetErrorName(found), ", ", cudaGetErrorString(found)));
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::UnavailableError(absl::StrCat("device is ", ordinal, ", this machine has ", count, " CUDA devices"));
  }
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    NIBBLE_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, ordinal));
    return value;
  };
  const Device device = {.ordinal = ordinal,
                         .capability = attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                                       attribute(cudaDevAttrComputeCapabilityMinor),
                         .multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
                         .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                         .l2_bytes = attribute(cudaDevAttrL2CacheSize)};
  if (std::none_of(std::begin(kBuiltFor), std::end(kBuiltFor),
                   [&](int built) { return RunsOn(built, device.capability); })) {
    std::string built_for;
    for (int built : kBuiltFor) absl::StrAppend(&built_for, built_for.empty() ? "" : ", ", Dotted(built));
    return absl::UnavailableError(absl::StrCat("device ", ordinal, " has compute capability ",
                                               Dotted(device.capability), ", this build has kernels for ", built_for));
  }
  if (const cudaError_t chosen = cudaSetDevice(ordinal); chosen != cudaSuccess) {
    return absl::UnavailableError(absl::StrCat("device ", ordinal, " cannot be used: ", cudaGetErrorName(chosen), ", ",
                                               cudaGetErrorString(chosen)));
  }
  return device;
}

std::string DeviceName(int ordinal) {
  cudaDeviceProp properties;
  NIBBLE_CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
  return absl::StrCat(properties.name, ", compute capability ", properties.major, ".", properties.minor);
}

bool IsSticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

absl::StatusOr<Buffer> AllocateDevice(const Device& device, int64_t bytes, const char* purpose) {
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();  // said here; later calls need not say it again
    return absl::ResourceExhaustedError(absl::StrCat("no device memory for ", bytes, " bytes of ", purpose));
  }
  Buffer buffer(data, static_cast<size_t>(bytes), [](void* p) { cudaFree(p); });
  NIBBLE_CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), device.stream));
  return buffer;
}

}  // namespace nibble::cuda
