#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/ops.h"
#ifdef NIBBLE_CUDA
#include "kernels/cuda/cuda_ops.h"
#endif

namespace nibble {

absl::StatusOr<std::unique_ptr<Ops>> CreateOps(const OpsOptions& options) {
  constexpr int kMaxThreads = 1024;
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("threads is ", options.threads, ", must be 1 to ", kMaxThreads));
  }
  if (options.backend == "cpu") return CreateCpuOps({.threads = options.threads});
  if (options.backend == "cuda") {
#ifdef NIBBLE_CUDA
    return CreateCudaOps({.device = options.device});
#else
    return absl::UnavailableError("backend is cuda, but this build has no CUDA kernels; use backend cpu");
#endif
  }
  return absl::InvalidArgumentError(absl::StrCat("backend is \"", options.backend, "\", must be cpu or cuda"));
}

}  // namespace nibble
