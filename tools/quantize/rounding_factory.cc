#include "absl/strings/str_cat.h"
#include "tools/quantize/gptq.h"
#if NIBBLE_ROUNDING_CUDA
#include "tools/quantize/cuda/rounding_device.h"
#endif

namespace nibble {

absl::StatusOr<std::unique_ptr<RoundingDevice>> CreateRoundingDevice(const RoundingDeviceOptions& options) {
  constexpr int kMaxThreads = 1024;
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("threads is ", options.threads, ", must be 1 to ", kMaxThreads));
  }
  if (options.device == "cpu") return CreateCpuRoundingDevice(options.threads);
  if (options.device == "cuda") {
#if NIBBLE_ROUNDING_CUDA
    return cuda::CudaRoundingDevice::Create(options.threads);
#else
    return absl::UnavailableError("device is cuda, but this build has no CUDA; use device cpu");
#endif
  }
  return absl::InvalidArgumentError(absl::StrCat("device is \"", options.device, "\", must be cpu or cuda"));
}

}  // namespace nibble
