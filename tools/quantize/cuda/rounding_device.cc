#include "tools/quantize/cuda/rounding_device.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/ops.h"
#include "tools/quantize/cuda/device_array.h"
#include "tools/quantize/cuda/rounding_kernels.h"
#include "tools/quantize/rounding_order.h"

namespace nibble::cuda {
namespace {

#define NIBBLE_CUBLAS_CHECK(call) NIBBLE_CHECK((call) == CUBLAS_STATUS_SUCCESS, #call)
#define NIBBLE_CUSOLVER_CHECK(call) NIBBLE_CHECK((call) == CUSOLVER_STATUS_SUCCESS, #call)

constexpr int kDampingTries = 4;
constexpr int64_t kChunkElements = int64_t{64} << 20;  // of an input on its way to bf16

class Moments : public InputMoments {
 public:
  int64_t k() const override { return k_; }
  int64_t rows() const override { return rows_seen; }
  absl::StatusOr<std::vector<float>> Hessian() const override {
    std::vector<float> full(static_cast<size_t>(k_ * k_));
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(full.data(), gram.data(), full.size() * 4, cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (int64_t i = 0; i < k_; ++i) {
      for (int64_t j = 0; j < i; ++j) full[static_cast<size_t>(i * k_ + j)] = full[static_cast<size_t>(j * k_ + i)];
    }
    return full;
  }
  absl::StatusOr<std::vector<float>> MeanSquare() const override {
    std::vector<float> mean = Diagonal();
    for (float& x : mean) x /= static_cast<float>(std::max<int64_t>(1, rows_seen));
    return mean;
  }
  std::vector<float> Diagonal() const {
    std::vector<float> diagonal(static_cast<size_t>(k_));
    NIBBLE_CUDA_CHECK(cudaMemcpy2DAsync(diagonal.data(), 4, gram.data(), static_cast<size_t>(k_ + 1) * 4, 4,
                                        static_cast<size_t>(k_), cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return diagonal;
  }

  Moments(int64_t k, cudaStream_t stream) : k_(k), stream_(stream) {}
  DeviceArray<float> gram;   // [K, K] Σ x·xᵀ; the upper triangle counts
  DeviceArray<float> cross;  // [K, K] Σ (x − coded)·codedᵀ, or empty
  int64_t rows_seen = 0;

 private:
  const int64_t k_;
  const cudaStream_t stream_;
};

// Everything in rounding order.
struct Factor : public RoundingFactor {
  ColumnOrder order;
  DeviceArray<int32_t> channel, group_of, place_of;
  DeviceArray<int32_t> places;       // [K] places of the columns of group 0, group 1, ...
  DeviceArray<float> hessian;        // [K, K] damped
  DeviceArray<float> feedback;       // [K, K] m_ij / m_jj, or empty
  DeviceArray<float> correction;     // [K, K] C·H⁻¹, or empty
  DeviceArray<float> column_weight;  // [K]
  double damping = 0, ridge = 0;
  int64_t dead_columns = 0;
  std::string fallback;
};

class SingleGpu : public CudaRoundingDevice {
 public:
  explicit SingleGpu(const cudaDeviceProp& properties) : name_(properties.name) {
    NIBBLE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    NIBBLE_CUBLAS_CHECK(cublasCreate(&blas_));
    NIBBLE_CUBLAS_CHECK(cublasSetStream(blas_, stream_));
    NIBBLE_CUBLAS_CHECK(cublasSetMathMode(blas_, CUBLAS_DEFAULT_MATH));
    NIBBLE_CUSOLVER_CHECK(cusolverDnCreate(&solver_));
    NIBBLE_CUSOLVER_CHECK(cusolverDnSetStream(solver_, stream_));
    NIBBLE_CUSOLVER_CHECK(cusolverDnCreateParams(&parameters_));
  }
  ~SingleGpu() override {
    cusolverDnDestroyParams(parameters_);
    cusolverDnDestroy(solver_);
    cublasDestroy(blas_);
    cudaStreamDestroy(stream_);
  }

  std::string Describe() const override { return absl::StrCat("cuda, ", name_); }
  int64_t TakePeakBytes() override { return std::exchange(meter_.peak, meter_.held); }

  absl::StatusOr<std::unique_ptr<InputMoments>> CreateMoments(int64_t k, bool with_coding_error) override {
    if (k <= 0 || k % kBlock != 0) {
      return absl::InvalidArgumentError(absl::StrCat("input has ", k, " channels, must be a multiple of ", kBlock));
    }
    auto moments = std::make_unique<Moments>(k, stream_);
    NIBBLE_ASSIGN_OR_RETURN(moments->gram, Zeros<float>(k * k));
    if (with_coding_error) {
      NIBBLE_ASSIGN_OR_RETURN(moments->cross, Zeros<float>(k * k));
    }
    return moments;
  }

  absl::Status Accumulate(std::span<const float> x, InputMoments* moments) override {
    Moments& to = static_cast<Moments&>(*moments);
    NIBBLE_CHECK(to.cross.empty());
    return AddRows(x, {}, &to);
  }
  absl::Status Accumulate(std::span<const float> x, std::span<const float> coded, InputMoments* moments) override {
    Moments& to = static_cast<Moments&>(*moments);
    NIBBLE_CHECK(!to.cross.empty());
    NIBBLE_CHECK_EQ(x.size(), coded.size());
    return AddRows(x, coded, &to);
  }

  absl::StatusOr<std::unique_ptr<RoundingFactor>> Factorize(const InputMoments& moments, const InputPlan& plan,
                                                            const GptqOptions& options) override {
    const Moments& from = static_cast<const Moments&>(moments);
    const int64_t k = from.k();
    auto factor = std::make_unique<Factor>();
    const std::vector<float> diagonal = from.Diagonal();
    factor->order = OrderColumns(diagonal, plan, options.order);
    factor->dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0f);
    NIBBLE_RETURN_IF_ERROR(UploadOrder(factor.get()));
    double mean = 0;
    for (const float x : diagonal) mean += static_cast<double>(x) / static_cast<double>(k);

    GatherArgs gather{.from = from.gram.data(), .channel = factor->channel.data(), .k = k};
    NIBBLE_ASSIGN_OR_RETURN(factor->column_weight, Allocate<float>(k));
    DeviceArray<double> lower;  // of the reversed Hessian
    bool factored = false;
    if (options.compensate || !from.cross.empty()) {
      NIBBLE_ASSIGN_OR_RETURN(lower, Allocate<double>(k * k));
      gather.reversed = true;
      double damping = options.damping;
      for (int tries = 0; tries < kDampingTries && !factored; ++tries, damping *= 10) {
        factor->damping = damping;
        factor->ridge = gather.ridge = damping * mean;
        LaunchGather(stream_, gather, lower.data());
        NIBBLE_ASSIGN_OR_RETURN(const int pivot, Cholesky(k, lower.data()));
        factored = pivot == 0 && std::isfinite(mean) && mean > 0;
        if (!factored) {
          factor->fallback =
              absl::StrCat("the Hessian is not positive definite: pivot ", pivot > 0 ? k - pivot : k - 1, " of ", k);
        }
      }
      if (factored) factor->fallback.clear();
      gather.reversed = false;
    }
    gather.ridge = factor->ridge;
    if (options.compensate && factored) {
      NIBBLE_ASSIGN_OR_RETURN(factor->feedback, Allocate<float>(k * k));
      LaunchFeedback(stream_, lower.data(), k, factor->feedback.data(), factor->column_weight.data());
    } else {
      std::vector<float> weight;
      for (const int32_t channel : factor->order.channel) {
        const double h = static_cast<double>(diagonal[static_cast<size_t>(channel)]) + factor->ridge;
        weight.push_back(std::isfinite(h) ? static_cast<float>(h) : 0.0f);
      }
      Upload(weight, factor->column_weight.data());
    }
    if (!from.cross.empty() && factored) {
      // G·H = C over reversed places, so H·Gᵀ = Cᵀ: row-major memory read by columns is the transpose, both ways.
      NIBBLE_ASSIGN_OR_RETURN(DeviceArray<double> solution, Allocate<double>(k * k));
      LaunchGather(
          stream_,
          {.from = from.cross.data(), .channel = factor->channel.data(), .k = k, .symmetric = false, .reversed = true},
          solution.data());
      NIBBLE_ASSIGN_OR_RETURN(DeviceArray<int> info, Zeros<int>(1));
      NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrs(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, k, CUDA_R_64F,
                                             lower.data(), k, CUDA_R_64F, solution.data(), k, info.data()));
      NIBBLE_ASSIGN_OR_RETURN(factor->correction, Allocate<float>(k * k));
      LaunchReverse(stream_, solution.data(), k, factor->correction.data());
      NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    }
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    lower = DeviceArray<double>();
    NIBBLE_ASSIGN_OR_RETURN(factor->hessian, Allocate<float>(k * k));
    LaunchGather(stream_, gather, factor->hessian.data());
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return factor;
  }

  absl::StatusOr<RoundedLinear> Round(const DenseLinear& linear, const InputPlan& plan, const InputMoments& moments,
                                      const RoundingFactor& factor_base, const GptqOptions& options) override {
    const Factor& factor = static_cast<const Factor&>(factor_base);
    const int64_t n = linear.shape.n, k = linear.shape.k, groups = k / kBlock;
    NIBBLE_CHECK_EQ(k, moments.k());
    NIBBLE_CHECK(!options.row_clips.empty());

    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> weight, Allocate<float>(n * k));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> target, Allocate<float>(n * k));
    Upload(linear.weight, target.data());
    LaunchGatherColumns(stream_, target.data(), factor.channel.data(), n, k, weight.data());
    if (!factor.correction.empty()) {
      Copy(weight.data(), n * k, target.data());
      Multiply(target.data(), k, factor.correction.data(), k, n, k, k, 1, weight.data(), k);
    }

    const int64_t sizes[] = {n * k, n * groups, n};
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> error, Allocate<float>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> best_error, Allocate<float>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> codes, Allocate<uint8_t>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> best_codes, Allocate<uint8_t>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> group_scale, Allocate<float>(2 * sizes[1]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> group_min, Allocate<float>(2 * sizes[1]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> rows, Allocate<float>(5 * n));
    float* const largest = rows.data();
    float* const step = largest + n;
    float* const loss = step + n;
    float* const best_step = loss + n;
    float* const best_loss = best_step + n;
    const RoundArgs args{.n = n,
                         .k = k,
                         .weight = weight.data(),
                         .column_weight = factor.column_weight.data(),
                         .group_of = factor.group_of.data(),
                         .step = step,
                         .target = target.data(),
                         .error = error.data(),
                         .codes = codes.data(),
                         .group_scale = group_scale.data(),
                         .group_min = group_min.data()};
    RoundArgs best = args;
    best.step = best_step;
    best.error = best_error.data();
    best.codes = best_codes.data();
    best.group_scale += sizes[1];
    best.group_min += sizes[1];

    LaunchRowMax(stream_, weight.data(), n, k, largest);
    for (size_t c = 0; c < options.row_clips.size(); ++c) {
      LaunchRowStep(stream_, largest, options.row_clips[c], n, step);
      NIBBLE_CUDA_CHECK(cudaMemsetAsync(loss, 0, static_cast<size_t>(n) * 4, stream_));
      Sweep(args, factor, options.search_groups, loss);
      LaunchTakeBetter(stream_, args, loss, c == 0, best, best_step, best_loss);
    }
    if (!factor.feedback.empty()) {
      for (int round = 0; round < options.refinements; ++round) Refine(best, factor, target.data(), best_step);
    }
    LaunchZeroRows(stream_, largest, n, k, best_step, best_error.data());

    RoundedLinear out{.tensors = EmptyTensors(linear.shape, plan), .report = {}};
    out.tensors.bias = linear.bias;
    out.report.damping = factor.damping;
    out.report.dead_columns = factor.dead_columns;
    out.report.fallback = factor.fallback;
    NIBBLE_ASSIGN_OR_RETURN(out.report.output_error, Energy(best_error.data(), n, factor, target.data()));
    NIBBLE_ASSIGN_OR_RETURN(out.report.output_energy, Energy(weight.data(), n, factor, target.data()));

    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> packed, Allocate<uint8_t>(n * k / 2));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> packed_scale, Allocate<uint8_t>(sizes[1]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<int8_t> packed_min, Allocate<int8_t>(sizes[1]));
    LaunchPack(stream_, {.n = n,
                         .k = k,
                         .codes = best.codes,
                         .place_of = factor.place_of.data(),
                         .group_scale = best.group_scale,
                         .group_min = best.group_min,
                         .packed = packed.data(),
                         .packed_scale = packed_scale.data(),
                         .packed_min = packed_min.data()});
    Download(packed.data(), &out.tensors.qweight);
    Download(packed_scale.data(), &out.tensors.group_scale);
    Download(packed_min.data(), &out.tensors.group_min);
    Download(best_step, &out.tensors.channel_scale);
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return out;
  }

 private:
  template <typename T>
  absl::StatusOr<DeviceArray<T>> Allocate(int64_t size) {
    return DeviceArray<T>::Allocate(size, &meter_);
  }
  template <typename T>
  absl::StatusOr<DeviceArray<T>> Zeros(int64_t size) {
    NIBBLE_ASSIGN_OR_RETURN(DeviceArray<T> array, Allocate<T>(size));
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(array.data(), 0, static_cast<size_t>(size) * sizeof(T), stream_));
    return array;
  }
  template <typename T>
  void Upload(const std::vector<T>& from, T* to) {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream_));
  }
  template <typename T>
  void Download(const T* from, std::vector<T>* to) {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to->data(), from, to->size() * sizeof(T), cudaMemcpyDeviceToHost, stream_));
  }
  void Copy(const float* from, int64_t count, float* to) {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * 4, cudaMemcpyDeviceToDevice, stream_));
  }

  // c [M, N] = beta c + a [M, K] · b [K, N], row-major f32.
  void Multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float beta,
                float* c, int64_t ldc) {
    const float one = 1;
    NIBBLE_CUBLAS_CHECK(cublasSgemm_64(blas_, CUBLAS_OP_N, CUBLAS_OP_N, n, m, k, &one, b, ldb, a, lda, &beta, c, ldc));
  }

  // to [K, K] += aᵀ·b over bf16 rows. cuBLAS sees columns: the result's transpose is bᵀ·a.
  void AddProduct(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t k, float* to) {
    const float one = 1;
    NIBBLE_CUBLAS_CHECK(cublasGemmEx_64(blas_, CUBLAS_OP_N, CUBLAS_OP_T, k, k, rows, &one, b, CUDA_R_16BF, k, a,
                                        CUDA_R_16BF, k, &one, to, CUDA_R_32F, k, CUBLAS_COMPUTE_32F,
                                        CUBLAS_GEMM_DEFAULT));
  }

  absl::Status AddRows(std::span<const float> x, std::span<const float> coded, Moments* to) {
    const int64_t k = to->k(), total = static_cast<int64_t>(x.size()) / k;
    NIBBLE_CHECK_EQ(static_cast<int64_t>(x.size()) % k, 0);
    const int64_t chunk = std::min(total, std::max<int64_t>(1, kChunkElements / k));
    const bool with_coding = !coded.empty();
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> rows, Allocate<float>(chunk * k));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint16_t> narrow, Allocate<uint16_t>(chunk * k));
    DeviceArray<float> coded_rows;
    DeviceArray<uint16_t> lost;
    if (with_coding) {
      NIBBLE_ASSIGN_OR_RETURN(coded_rows, Allocate<float>(chunk * k));
      NIBBLE_ASSIGN_OR_RETURN(lost, Allocate<uint16_t>(chunk * k));
    }
    for (int64_t begin = 0; begin < total; begin += chunk) {
      const int64_t count = std::min(chunk, total - begin);
      const size_t bytes = static_cast<size_t>(count * k) * 4;
      NIBBLE_CUDA_CHECK(cudaMemcpyAsync(rows.data(), x.data() + begin * k, bytes, cudaMemcpyDefault, stream_));
      if (!with_coding) {
        LaunchToBF16(stream_, rows.data(), nullptr, count * k, narrow.data());
      } else {
        NIBBLE_CUDA_CHECK(
            cudaMemcpyAsync(coded_rows.data(), coded.data() + begin * k, bytes, cudaMemcpyDefault, stream_));
        LaunchToBF16(stream_, coded_rows.data(), nullptr, count * k, narrow.data());
        LaunchToBF16(stream_, rows.data(), coded_rows.data(), count * k, lost.data());
        AddProduct(lost.data(), narrow.data(), count, k, to->cross.data());
      }
      AddProduct(narrow.data(), narrow.data(), count, k, to->gram.data());
    }
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    to->rows_seen += total;
    return absl::OkStatus();
  }

  absl::Status UploadOrder(Factor* factor) {
    const size_t k = factor->order.code.size();
    std::vector<int32_t> place_of(k), places;
    std::vector<std::vector<int32_t>> of_group(k / static_cast<size_t>(kBlock));
    for (size_t place = 0; place < k; ++place) {
      place_of[static_cast<size_t>(factor->order.code[place])] = static_cast<int32_t>(place);
      of_group[static_cast<size_t>(factor->order.group[place])].push_back(static_cast<int32_t>(place));
    }
    for (const auto& group : of_group) places.insert(places.end(), group.begin(), group.end());
    const auto upload = [&](const std::vector<int32_t>& from, DeviceArray<int32_t>* to) -> absl::Status {
      NIBBLE_ASSIGN_OR_RETURN(*to, Allocate<int32_t>(static_cast<int64_t>(from.size())));
      Upload(from, to->data());
      return absl::OkStatus();
    };
    NIBBLE_RETURN_IF_ERROR(upload(factor->order.channel, &factor->channel));
    NIBBLE_RETURN_IF_ERROR(upload(factor->order.group, &factor->group_of));
    NIBBLE_RETURN_IF_ERROR(upload(place_of, &factor->place_of));
    NIBBLE_RETURN_IF_ERROR(upload(places, &factor->places));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));  // the vectors above end here
    return absl::OkStatus();
  }

  // a [K, K] symmetric becomes its lower Cholesky factor (row-major). Returns 0, or the leading minor that is not
  // positive definite.
  absl::StatusOr<int> Cholesky(int64_t k, double* a) {
    size_t device_bytes = 0, host_bytes = 0;
    NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrf_bufferSize(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, CUDA_R_64F, a, k,
                                                      CUDA_R_64F, &device_bytes, &host_bytes));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> workspace,
                            Allocate<uint8_t>(static_cast<int64_t>(device_bytes)));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<int> info, Zeros<int>(1));
    std::vector<uint8_t> host_workspace(host_bytes);
    NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrf(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, CUDA_R_64F, a, k,
                                           CUDA_R_64F, workspace.data(), device_bytes, host_workspace.data(),
                                           host_bytes, info.data()));
    int minor = 0;
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(&minor, info.data(), sizeof(int), cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    NIBBLE_CHECK(minor >= 0, "cusolverDnXpotrf");
    return minor;
  }

  // Rounds all columns with args.step: 128 at a time, then one product carries their errors to all later columns.
  void Sweep(const RoundArgs& args, const Factor& factor, bool search, float* loss) {
    const int64_t n = args.n, k = args.k;
    Copy(args.weight, n * k, args.target);
    if (!factor.order.groups_in_turn) {
      for (int64_t g = 0; g < k / kBlock; ++g)
        LaunchSearchGroup(stream_, args, factor.places.data() + g * kBlock, g, search);
    }
    for (int64_t begin = 0; begin < k; begin += kBlock) {
      if (factor.order.groups_in_turn) {
        const int64_t g = factor.order.group[static_cast<size_t>(begin)];
        LaunchSearchGroup(stream_, args, factor.places.data() + g * kBlock, g, search);
      }
      LaunchSweep(stream_, args, factor.feedback.data(), begin, loss);
      const int64_t next = begin + kBlock;
      if (factor.feedback.empty() || next == k) continue;
      Multiply(args.error + begin, k, factor.feedback.data() + begin * k + next, k, n, k - next, kBlock, 1,
               args.target + next, k);
    }
  }

  // work [N, K].
  void Refine(const RoundArgs& args, const Factor& factor, float* work, float* step) {
    for (int64_t begin = 0; begin < args.k; begin += kBlock) {
      Multiply(args.error, args.k, factor.hessian.data() + begin, args.k, args.n, kBlock, args.k, 0, work, kBlock);
      LaunchRefine(stream_, args, factor.hessian.data(), work, begin);
    }
    LaunchErrorToValue(stream_, args);
    Multiply(args.error, args.k, factor.hessian.data(), args.k, args.n, args.k, args.k, 0, work, args.k);
    LaunchRefitRows(stream_, args, work, step);
  }

  // Σ v·H·vᵀ over the rows of v [N, K], H without what damping added; work [N, K].
  absl::StatusOr<double> Energy(const float* v, int64_t n, const Factor& factor, float* work) {
    const int64_t k = static_cast<int64_t>(factor.order.code.size());
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<double> rows, Allocate<double>(n));
    Multiply(v, k, factor.hessian.data(), k, n, k, k, 0, work, k);
    LaunchEnergy(stream_, v, work, factor.ridge, n, k, rows.data());
    std::vector<double> energies(static_cast<size_t>(n));
    Download(rows.data(), &energies);
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    double sum = 0;
    for (const double energy : energies) sum += energy;
    return sum;
  }

  const std::string name_;
  cudaStream_t stream_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  cusolverDnHandle_t solver_ = nullptr;
  cusolverDnParams_t parameters_ = nullptr;
  MemoryMeter meter_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaRoundingDevice>> CudaRoundingDevice::Create() {
  cudaDeviceProp properties{};
  const cudaError_t error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess) {
    return absl::UnavailableError(
        absl::StrCat("device is cuda, but there is no usable GPU: ", cudaGetErrorString(error)));
  }
  NIBBLE_CUDA_CHECK(cudaSetDevice(0));
  return std::make_unique<SingleGpu>(properties);
}

}  // namespace nibble::cuda
