#include "tools/quantize/cuda/rounding_device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/float16.h"
#include "common/base/status.h"
#include "common/base/thread_pool.h"
#include "kernels/cuda/device.h"
#include "kernels/ops.h"
#include "tools/quantize/cuda/device_array.h"
#include "tools/quantize/cuda/gpu.h"
#include "tools/quantize/cuda/rounding_kernels.h"
#include "tools/quantize/cuda/rounding_state.h"
#include "tools/quantize/cuda/stage.h"
#include "tools/quantize/rounding_order.h"

namespace nibble::cuda {
namespace {

constexpr int kDampingTries = 4;

class SingleGpu : public CudaRoundingDevice {
 public:
  SingleGpu(const cudaDeviceProp& properties, int threads) : name_(properties.name), pool_(threads) {}

  std::string Describe() const override { return absl::StrCat("cuda, ", name_); }
  int64_t TakePeakBytes() override { return std::exchange(gpu_.meter().peak, gpu_.meter().held); }

  absl::StatusOr<std::unique_ptr<InputMoments>> CreateMoments(int64_t k, bool with_coding_error) override {
    if (k <= 0 || k % kBlock != 0) {
      return absl::InvalidArgumentError(absl::StrCat("input has ", k, " channels, must be a multiple of ", kBlock));
    }
    auto moments = std::make_unique<Moments>(k, gpu_.stream());
    NIBBLE_ASSIGN_OR_RETURN(moments->gram, gpu_.Zeros<float>(k * k));
    if (with_coding_error) {
      NIBBLE_ASSIGN_OR_RETURN(moments->cross, gpu_.Zeros<float>(k * k));
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
    NIBBLE_ASSIGN_OR_RETURN(factor->column_weight, gpu_.Allocate<float>(k));
    DeviceArray<double> lower;  // of the reversed Hessian
    bool factored = false;
    if (options.compensate || !from.cross.empty()) {
      NIBBLE_ASSIGN_OR_RETURN(lower, gpu_.Allocate<double>(k * k));
      gather.reversed = true;
      double damping = options.damping;
      for (int tries = 0; tries < kDampingTries && !factored; ++tries, damping *= 10) {
        factor->damping = damping;
        factor->ridge = gather.ridge = damping * mean;
        LaunchGather(gpu_.stream(), gather, lower.data());
        NIBBLE_ASSIGN_OR_RETURN(const int pivot, gpu_.Cholesky(k, lower.data()));
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
      NIBBLE_ASSIGN_OR_RETURN(factor->feedback, gpu_.Allocate<float>(k * k));
      LaunchFeedback(gpu_.stream(), lower.data(), k, factor->feedback.data(), factor->column_weight.data());
    } else {
      std::vector<float> weight;
      for (const int32_t channel : factor->order.channel) {
        const double h = static_cast<double>(diagonal[static_cast<size_t>(channel)]) + factor->ridge;
        weight.push_back(std::isfinite(h) ? static_cast<float>(h) : 0.0f);
      }
      gpu_.Upload(weight, factor->column_weight.data());
    }
    if (!from.cross.empty() && factored) {
      // G·H = C.
      NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<double> solution, gpu_.Allocate<double>(k * k));
      LaunchGather(
          gpu_.stream(),
          {.from = from.cross.data(), .channel = factor->channel.data(), .k = k, .symmetric = false, .reversed = true},
          solution.data());
      NIBBLE_RETURN_IF_ERROR(gpu_.SolveRows(k, lower.data(), solution.data()));
      NIBBLE_ASSIGN_OR_RETURN(factor->correction, gpu_.Allocate<float>(k * k));
      LaunchReverse(gpu_.stream(), solution.data(), k, factor->correction.data());
    }
    gpu_.Synchronize();
    lower = DeviceArray<double>();
    NIBBLE_ASSIGN_OR_RETURN(factor->hessian, gpu_.Allocate<float>(k * k));
    LaunchGather(gpu_.stream(), gather, factor->hessian.data());
    gpu_.Synchronize();
    return factor;
  }

  absl::StatusOr<RoundedLinear> Round(const DenseLinear& linear, const InputPlan& plan, const InputMoments& moments,
                                      const RoundingFactor& factor_base, const GptqOptions& options) override {
    const Factor& factor = static_cast<const Factor&>(factor_base);
    const int64_t n = linear.shape.n, k = linear.shape.k, groups = k / kBlock;
    NIBBLE_CHECK_EQ(k, moments.k());
    NIBBLE_CHECK(!options.row_clips.empty());

    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> weight, gpu_.Allocate<float>(n * k));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> target, gpu_.Allocate<float>(n * k));
    gpu_.Upload(linear.weight, target.data());
    LaunchGatherColumns(gpu_.stream(), target.data(), factor.channel.data(), n, k, weight.data());
    if (!factor.correction.empty()) {
      gpu_.Copy(weight.data(), n * k, target.data());
      gpu_.Multiply(target.data(), k, factor.correction.data(), k, n, k, k, 1, weight.data(), k);
    }

    const int64_t sizes[] = {n * k, n * groups, n};
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> error, gpu_.Allocate<float>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> best_error, gpu_.Allocate<float>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> codes, gpu_.Allocate<uint8_t>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> best_codes, gpu_.Allocate<uint8_t>(sizes[0]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> group_scale, gpu_.Allocate<float>(2 * sizes[1]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> group_min, gpu_.Allocate<float>(2 * sizes[1]));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<float> rows, gpu_.Allocate<float>(5 * n));
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

    LaunchRowMax(gpu_.stream(), weight.data(), n, k, largest);
    for (size_t c = 0; c < options.row_clips.size(); ++c) {
      LaunchRowStep(gpu_.stream(), largest, options.row_clips[c], n, step);
      NIBBLE_CUDA_CHECK(cudaMemsetAsync(loss, 0, static_cast<size_t>(n) * 4, gpu_.stream()));
      Sweep(args, factor, options.search_groups, loss);
      LaunchTakeBetter(gpu_.stream(), args, loss, c == 0, best, best_step, best_loss);
    }
    if (!factor.feedback.empty()) {
      for (int round = 0; round < options.refinements; ++round) Refine(best, factor, target.data(), best_step);
    }
    LaunchZeroRows(gpu_.stream(), largest, n, k, best_step, best_error.data());

    RoundedLinear out{.tensors = EmptyTensors(linear.shape, plan), .report = {}};
    out.tensors.bias = linear.bias;
    out.report.damping = factor.damping;
    out.report.dead_columns = factor.dead_columns;
    out.report.fallback = factor.fallback;
    NIBBLE_ASSIGN_OR_RETURN(out.report.output_error, Energy(best_error.data(), n, factor, target.data()));
    NIBBLE_ASSIGN_OR_RETURN(out.report.output_energy, Energy(weight.data(), n, factor, target.data()));

    NIBBLE_RETURN_IF_ERROR(Pack(best, factor, &out.tensors));
    gpu_.Download(best_step, &out.tensors.channel_scale);
    gpu_.Synchronize();
    return out;
  }

 private:
  // Rows go to bf16 on the host's threads, into pinned memory: half the bytes to move, and the next chunk is narrowed
  // while this one is moved and multiplied.
  absl::Status AddRows(std::span<const float> x, std::span<const float> coded, Moments* to) {
    const int64_t k = to->k(), total = static_cast<int64_t>(x.size()) / k;
    NIBBLE_CHECK_EQ(static_cast<int64_t>(x.size()) % k, 0);
    const int64_t chunk = kStageElements / k;
    NIBBLE_CHECK(chunk > 0);
    const bool with_coding = !coded.empty();
    for (int64_t begin = 0, turn = 0; begin < total; begin += chunk, ++turn) {
      const int64_t count = std::min(chunk, total - begin);
      Stage& read = stages_[static_cast<size_t>(turn % 2)];  // what the linear reads
      Stage& lost = stages_[static_cast<size_t>(2 + turn % 2)];
      NIBBLE_RETURN_IF_ERROR(read.Prepare(&gpu_));
      if (with_coding) NIBBLE_RETURN_IF_ERROR(lost.Prepare(&gpu_));
      const float* const from = x.data() + begin * k;
      const float* const from_coded = with_coding ? coded.data() + begin * k : nullptr;
      pool_.ParallelFor(count, [&](int64_t row, int) {
        uint16_t* const narrow = read.host() + row * k;
        for (int64_t i = row * k; i < (row + 1) * k; ++i) {
          narrow[i - row * k] = ToBF16(with_coding ? from_coded[i] : from[i]).bits;
          if (with_coding) lost.host()[i] = ToBF16(from[i] - from_coded[i]).bits;
        }
      });
      read.Upload(gpu_, count * k);
      if (with_coding) {
        lost.Upload(gpu_, count * k);
        gpu_.AddProduct(lost.device(), read.device(), count, k, to->cross.data());
        lost.Release(gpu_);
      }
      gpu_.AddProduct(read.device(), read.device(), count, k, to->gram.data());
      read.Release(gpu_);
    }
    gpu_.Synchronize();
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
      NIBBLE_ASSIGN_OR_RETURN(*to, gpu_.Allocate<int32_t>(static_cast<int64_t>(from.size())));
      gpu_.Upload(from, to->data());
      return absl::OkStatus();
    };
    NIBBLE_RETURN_IF_ERROR(upload(factor->order.channel, &factor->channel));
    NIBBLE_RETURN_IF_ERROR(upload(factor->order.group, &factor->group_of));
    NIBBLE_RETURN_IF_ERROR(upload(place_of, &factor->place_of));
    NIBBLE_RETURN_IF_ERROR(upload(places, &factor->places));
    gpu_.Synchronize();  // the vectors above end here
    return absl::OkStatus();
  }

  // Rounds all columns with args.step: 128 at a time, then one product carries their errors to all later columns.
  void Sweep(const RoundArgs& args, const Factor& factor, bool search, float* loss) {
    const int64_t n = args.n, k = args.k;
    gpu_.Copy(args.weight, n * k, args.target);
    if (!factor.order.groups_in_turn) {
      for (int64_t g = 0; g < k / kBlock; ++g)
        LaunchSearchGroup(gpu_.stream(), args, factor.places.data() + g * kBlock, g, search);
    }
    for (int64_t begin = 0; begin < k; begin += kBlock) {
      if (factor.order.groups_in_turn) {
        const int64_t g = factor.order.group[static_cast<size_t>(begin)];
        LaunchSearchGroup(gpu_.stream(), args, factor.places.data() + g * kBlock, g, search);
      }
      LaunchSweep(gpu_.stream(), args, factor.feedback.data(), begin, loss);
      const int64_t next = begin + kBlock;
      if (factor.feedback.empty() || next == k) continue;
      gpu_.Multiply(args.error + begin, k, factor.feedback.data() + begin * k + next, k, n, k - next, kBlock, 1,
                    args.target + next, k);
    }
  }

  // work [N, K].
  void Refine(const RoundArgs& args, const Factor& factor, float* work, float* step) {
    for (int64_t begin = 0; begin < args.k; begin += kBlock) {
      gpu_.Multiply(args.error, args.k, factor.hessian.data() + begin, args.k, args.n, kBlock, args.k, 0, work, kBlock);
      LaunchRefine(gpu_.stream(), args, factor.hessian.data(), work, begin);
    }
    LaunchErrorToValue(gpu_.stream(), args);
    gpu_.Multiply(args.error, args.k, factor.hessian.data(), args.k, args.n, args.k, args.k, 0, work, args.k);
    LaunchRefitRows(gpu_.stream(), args, work, step);
  }

  // Codes, scales and minima in the checkpoint's layout, code order.
  absl::Status Pack(const RoundArgs& args, const Factor& factor, LinearTensors* to) {
    const int64_t groups = args.n * (args.k / kBlock);
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> packed, gpu_.Allocate<uint8_t>(args.n * args.k / 2));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> scale, gpu_.Allocate<uint8_t>(groups));
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<int8_t> min, gpu_.Allocate<int8_t>(groups));
    LaunchPack(gpu_.stream(), {.n = args.n,
                               .k = args.k,
                               .codes = args.codes,
                               .place_of = factor.place_of.data(),
                               .group_scale = args.group_scale,
                               .group_min = args.group_min,
                               .packed = packed.data(),
                               .packed_scale = scale.data(),
                               .packed_min = min.data()});
    gpu_.Download(packed.data(), &to->qweight);
    gpu_.Download(scale.data(), &to->group_scale);
    gpu_.Download(min.data(), &to->group_min);
    gpu_.Synchronize();
    return absl::OkStatus();
  }

  // Σ v·H·vᵀ over the rows of v [N, K], H without what damping added; work [N, K].
  absl::StatusOr<double> Energy(const float* v, int64_t n, const Factor& factor, float* work) {
    const int64_t k = static_cast<int64_t>(factor.order.code.size());
    NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<double> rows, gpu_.Allocate<double>(n));
    gpu_.Multiply(v, k, factor.hessian.data(), k, n, k, k, 0, work, k);
    LaunchEnergy(gpu_.stream(), v, work, factor.ridge, n, k, rows.data());
    std::vector<double> energies(static_cast<size_t>(n));
    gpu_.Download(rows.data(), &energies);
    gpu_.Synchronize();
    double sum = 0;
    for (const double energy : energies) sum += energy;
    return sum;
  }

  const std::string name_;
  ThreadPool pool_;
  Gpu gpu_;
  std::array<Stage, 4> stages_;  // two of what linears read, two of what coding lost
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaRoundingDevice>> CudaRoundingDevice::Create(int threads) {
  cudaDeviceProp properties{};
  const cudaError_t error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess) {
    return absl::UnavailableError(
        absl::StrCat("device is cuda, but there is no usable GPU: ", cudaGetErrorString(error)));
  }
  NIBBLE_CUDA_CHECK(cudaSetDevice(0));
  return std::make_unique<SingleGpu>(properties, threads);
}

}  // namespace nibble::cuda
