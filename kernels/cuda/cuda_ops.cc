#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rows/rows.h"
#include "kernels/cuda/staging.h"

namespace nibble {
namespace {

using cuda::Device;
using cuda::RowPlan;

void FreeDevice(void* memory) { (void)cudaFree(memory); }  // fails only on a lost device

class CudaOps final : public Ops {
 public:
  CudaOps(const Device& device, cudaStream_t stream) : device_(device), staging_(stream) { device_.stream = stream; }
  ~CudaOps() override {
    Bind();
    (void)cudaStreamSynchronize(device_.stream);
    (void)cudaStreamDestroy(device_.stream);
  }

  const Device& device() const { return device_; }

  std::string Describe() const override {
    size_t free = 0, total = 0;
    NIBBLE_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return absl::StrCat("cuda:", device_.ordinal, ": ", cuda::DeviceName(device_.ordinal), ", ",
                        device_.multiprocessors, " SMs, ", total >> 20, " MiB");
  }

  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    Bind();
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
    if (error == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();  // not sticky, but reported until read
      size_t free = 0, total = 0;
      NIBBLE_CUDA_CHECK(cudaMemGetInfo(&free, &total));
      return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes on device ", device_.ordinal,
                                                       ", which has ", free, " of ", total, " bytes free"));
    }
    if (error != cudaSuccess) return Dead(error);
    Buffer buffer(memory, bytes, FreeDevice);
    if (const cudaError_t cleared = cudaMemsetAsync(memory, 0, bytes, device_.stream); cleared != cudaSuccess) {
      return Dead(cleared);
    }
    return buffer;
  }
  void Upload(void* to, const void* host_from, size_t bytes) override {
    Bind();
    Note(staging_.Upload(to, host_from, bytes));
  }
  void Download(void* host_to, const void* from, size_t bytes) override {
    Bind();
    const cudaError_t error = staging_.Download(host_to, from, bytes);
    if (error != cudaSuccess && bytes != 0) std::memset(host_to, 0, bytes);
    Note(error);
  }
  absl::Status Synchronize() override {
    Bind();
    Note(cudaStreamSynchronize(device_.stream));
    return error_ == cudaSuccess ? absl::OkStatus() : Dead(error_);
  }

 protected:
  absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) override { return Missing(); }
  absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) override { return Missing(); }

  void DoBeginStep(const BeginStepArgs& args) override {}
  void DoEmbed(const EmbedArgs& args) override {
    Bind();
    cuda::Embed(device_, args);
  }
  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override {
    Bind();
    cuda::AddNormQuantize(device_, args, PlanOf(*args.coding, args.residual.dtype));
  }
  void DoQuantize(const QuantizeArgs& args) override {
    Bind();
    cuda::Quantize(device_, args, PlanOf(*args.coding, args.in.dtype));
  }
  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override {
    Bind();
    cuda::SiluMulQuantize(device_, args, PlanOf(*args.coding, args.gate_up.dtype));
  }
  void DoLinear(const LinearArgs& args) override { NIBBLE_CHECK(false, "no linear layers"); }
  void DoRopeAppend(const RopeAppendArgs& args) override { NIBBLE_CHECK(false, "no attention"); }
  void DoAttention(const AttentionArgs& args) override { NIBBLE_CHECK(false, "no attention"); }
  void DoRecordHistory(const RecordHistoryArgs& args) override { NIBBLE_CHECK(false, "no sampling"); }
  void DoSample(const SampleArgs& args) override { NIBBLE_CHECK(false, "no sampling"); }

 private:
  static absl::Status Missing() { return absl::UnimplementedError("this build has no linear layers for CUDA"); }

  // The current device is a thread's own, and any thread may call.
  void Bind() const { (void)cudaSetDevice(device_.ordinal); }

  void Note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  absl::Status Dead(cudaError_t error) const {
    return absl::InternalError(absl::StrCat("CUDA device ", device_.ordinal, " failed: ", cudaGetErrorName(error), ", ",
                                            cudaGetErrorString(error), "; it stays unusable until this process ends"));
  }

  RowPlan PlanOf(const InputCoding& coding, DType dtype) const {
    const auto plan = cuda::PlanRow({.k = coding.k,
                                     .dtype = dtype,
                                     .quantized = coding.quantized,
                                     .transformed = coding.hadamard > 1 || coding.perm != nullptr},
                                    device_.shared_bytes);
    NIBBLE_CHECK(plan.ok(), plan.status().ToString());
    return *plan;
  }

  Device device_;
  cuda::Staging staging_;
  cudaError_t error_ = cudaSuccess;  // the first, kept: a dead device stays dead
};

}  // namespace

absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(const CudaOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const Device device, cuda::OpenDevice(options.device));
  cudaStream_t stream = nullptr;
  if (const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); error != cudaSuccess) {
    return absl::UnavailableError(absl::StrCat("device ", options.device, " cannot be used: ",
                                               cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
  }
  return std::make_unique<CudaOps>(device, stream);
}

const cuda::Device* cuda::DeviceOf(const Ops& ops) {
  const auto* cuda_ops = dynamic_cast<const CudaOps*>(&ops);
  return cuda_ops == nullptr ? nullptr : &cuda_ops->device();
}

}  // namespace nibble
