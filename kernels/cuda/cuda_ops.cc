#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/dense/dense.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rows/rows.h"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/cuda/staging.h"
#ifdef NIBBLE_CUDA_GEMM_W4AX
#include "kernels/cuda/gemm_w4ax/gemm.h"
#endif
#ifdef NIBBLE_CUDA_GEMM_SM80
#include "kernels/cuda/gemm_sm80/gemm.h"
#endif

namespace nibble {
namespace {

using cuda::Device;
using cuda::RowPlan;

void FreeDevice(void* memory) { (void)cudaFree(memory); }  // fails only on a lost device

class CudaOps final : public Ops {
 public:
  explicit CudaOps(const Device& device) : device_(device), staging_(device.stream) {}
  ~CudaOps() override {
    Bind();
    (void)cudaStreamSynchronize(device_.stream);
    (void)cudaStreamDestroy(device_.stream);
  }

  const Device& device() const { return device_; }

  // What operators find ready.
  absl::Status Prepare() {
    NIBBLE_ASSIGN_OR_RETURN(attention_counters_, Allocate(static_cast<size_t>(cuda::AttentionCounterBytes(device_))));
    return absl::OkStatus();
  }

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
  absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) override {
    Bind();
#ifdef NIBBLE_CUDA_GEMM_W4AX
    if (device_.capability == 90) {
      int64_t n = 0;
      for (const W4View& part : parts) n += part.n;
      NIBBLE_RETURN_IF_ERROR(ReserveScratch(
          cuda::LinearW4AxScratchBytes(n, parts[0].k, kMaxLinearRows, device_.multiprocessors)));
      return cuda::PackW4Ax(device_, staging_, parts);
    }
#endif
#ifdef NIBBLE_CUDA_GEMM_SM80
    if (device_.capability < 90) {
      NIBBLE_RETURN_IF_ERROR(ReserveScratch(
          cuda::sm80::LinearW4AxScratchBytes(parts[0].k, kMaxLinearRows, device_.multiprocessors)));
      return cuda::sm80::PackW4Ax(device_, staging_, parts);
    }
#endif
    return absl::UnimplementedError(
        absl::StrCat("this build has no 4-bit linear layers for compute capability ", device_.capability / 10, ".",
                     device_.capability % 10));
  }
  absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) override {
    Bind();
    return cuda::PackDense(device_, staging_, parts);
  }

  void DoBeginStep(const BeginStepArgs& args) override {
    Bind();
    NeedScratch(
        cuda::AttentionScratchBytes(device_, args.layout, args.q_heads, args.step.rows, args.step.max_pages));
  }
  void DoEmbed(const EmbedArgs& args) override {
    Bind();
    cuda::Embed(device_, args);
  }
  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override {
    Bind();
    cuda::AddNormQuantize(device_, args, PlanOf(*args.coding, args.out->rows, args.residual.dtype, /*norm=*/true));
  }
  void DoQuantize(const QuantizeArgs& args) override {
    Bind();
    cuda::Quantize(device_, args, PlanOf(*args.coding, args.in.rows, args.in.dtype));
  }
  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override {
    Bind();
    cuda::SiluMulQuantize(device_, args, PlanOf(*args.coding, args.gate_up.rows, args.gate_up.dtype));
  }
  void DoLinear(const LinearArgs& args) override {
    Bind();
    if (args.input.codes == nullptr) return cuda::LinearDense(device_, args);
    NIBBLE_CHECK_LE(args.input.rows, kMaxLinearRows);
#ifdef NIBBLE_CUDA_GEMM_SM80
    if (device_.capability < 90) return cuda::sm80::LinearW4Ax(device_, args);
#endif
#ifdef NIBBLE_CUDA_GEMM_W4AX
    cuda::LinearW4Ax(device_, args);
#endif
  }
  void DoRopeAppend(const RopeAppendArgs& args) override {
    Bind();
    cuda::RopeAppend(device_, args);
  }
  void DoAttention(const AttentionArgs& args) override {
    Bind();
    cuda::Attention(device_, args, attention_counters_.as<uint32_t>());
  }
  void DoRecordHistory(const RecordHistoryArgs& args) override {
    Bind();
    cuda::RecordHistory(device_, args);
  }
  void DoSample(const SampleArgs& args) override {
    Bind();
    NeedScratch(cuda::SampleScratchBytes(args.rows, args.vocab, device_.capability, device_.shared_bytes));
    cuda::Sample(device_, args);
  }

 private:
  // Rows of one quantized linear for which scratch is set aside when its weight is packed.
  static constexpr int64_t kMaxLinearRows = 16384;

  // The current device is a thread's own, and any thread may call.
  void Bind() const { (void)cudaSetDevice(device_.ordinal); }

  void Note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  absl::Status Dead(cudaError_t error) const {
    return absl::InternalError(absl::StrCat("CUDA device ", device_.ordinal, " failed: ", cudaGetErrorName(error), ", ",
                                            cudaGetErrorString(error), "; it stays unusable until this process ends"));
  }

  // Makes scratch at least `bytes` large. Outgrown memory stays, for graphs that were captured with it; as sizes at least
  // double, it is no more than what is in use.
  absl::Status ReserveScratch(int64_t bytes) {
    if (bytes <= device_.scratch_bytes) return absl::OkStatus();
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(device_.stream, &capture) == cudaSuccess) {
      NIBBLE_CHECK(capture == cudaStreamCaptureStatusNone,
                   absl::StrCat("scratch must grow to ", bytes, " bytes: run a step of this size before capturing it"));
    }
    const int64_t grown = std::max(bytes, 2 * device_.scratch_bytes);
    NIBBLE_ASSIGN_OR_RETURN(Buffer buffer, Allocate(static_cast<size_t>(grown)));
    device_.scratch = buffer.as<uint8_t>();
    device_.scratch_bytes = grown;
    scratch_.push_back(std::move(buffer));
    return absl::OkStatus();
  }
  // For operators, which have no way to report that memory ran out.
  void NeedScratch(int64_t bytes) {
    const absl::Status status = ReserveScratch(bytes);
    NIBBLE_CHECK(status.ok(), status.ToString());
  }

  RowPlan PlanOf(const InputCoding& coding, int64_t rows, DType dtype, bool norm = false) const {
    const auto plan = cuda::PlanRow({.rows = rows,
                                     .k = coding.k,
                                     .dtype = dtype,
                                     .norm = norm,
                                     .quantized = coding.quantized,
                                     .hadamard = coding.hadamard,
                                     .perm = coding.perm != nullptr},
                                    device_.capability, device_.shared_bytes, device_.multiprocessors);
    NIBBLE_CHECK(plan.ok(), plan.status().ToString());
    return *plan;
  }

  Device device_;
  cuda::Staging staging_;
  std::vector<Buffer> scratch_;  // the last is in use
  Buffer attention_counters_;
  cudaError_t error_ = cudaSuccess;  // the first, kept: a dead device stays dead
};

}  // namespace

absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(const CudaOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(Device device, cuda::OpenDevice(options.device));
  if (const cudaError_t error = cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking);
      error != cudaSuccess) {
    return absl::UnavailableError(absl::StrCat("device ", options.device, " cannot be used: ",
                                               cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
  }
  auto ops = std::make_unique<CudaOps>(device);
  NIBBLE_RETURN_IF_ERROR(ops->Prepare());
  return ops;
}

const Device* cuda::DeviceOf(const Ops& ops) {
  const auto* cuda_ops = dynamic_cast<const CudaOps*>(&ops);
  return cuda_ops == nullptr ? nullptr : &cuda_ops->device();
}

}  // namespace nibble
