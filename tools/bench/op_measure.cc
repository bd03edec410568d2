#include "tools/bench/op_measure.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <tuple>

#include "common/base/status.h"
#ifdef NIBBLE_CUDA
#include "kernels/cuda/measure/measure.h"
#endif

namespace nibble {
namespace {

class CpuMeasure final : public OpMeasure {
 public:
  int64_t rotate_bytes() const override { return int64_t{64} << 20; }
  void Describe(OpRun* run) override {}

  void Time(OpCase& op, int replays, OpResult* result) override {
    const auto run = [&](int launches) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < launches; ++i) op.Issue(i);
      const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
      return elapsed.count() / launches;
    };
    constexpr double kReplayUs = 20'000;
    const int launches = static_cast<int>(std::clamp(kReplayUs / std::max(run(1), 1.0), 1.0, 10'000.0));
    std::vector<double> us(replays);
    for (double& x : us) x = run(launches);
    std::sort(us.begin(), us.end());
    result->us = us[us.size() / 2];
    result->spread = (us.back() - us.front()) / result->us;
  }
  void TimeBaselines(const OpCase& op, int replays, OpResult* result) override {}
};

#ifdef NIBBLE_CUDA
class GpuMeasure final : public OpMeasure {
 public:
  explicit GpuMeasure(std::unique_ptr<cuda::Measure> measure) : measure_(std::move(measure)) {}

  int64_t rotate_bytes() const override { return 4 * measure_->facts().l2_bytes; }

  void Describe(OpRun* run) override {
    run->device = measure_->facts().name;
    run->driver = measure_->facts().driver;
    run->runtime = measure_->facts().runtime;
    run->read_bytes_per_second = measure_->ReadBandwidth();
  }

  void Time(OpCase& op, int replays, OpResult* result) override {
    constexpr double kReplayUs = 4'000;
    const double bandwidth = measure_->ReadBandwidth();
    double estimate = bandwidth == 0 ? 0 : op.bytes / bandwidth * 1e6;
    estimate = std::max(estimate, op.operations / 8e8);
    const int launches = static_cast<int>(std::clamp(kReplayUs / std::max(estimate, 1.0), 4.0, 20.0));
    const cuda::Measured measured = measure_->Replay(launches, replays, [&](int i) { op.Issue(i); });
    result->us = measured.us;
    result->spread = measured.spread;
    result->clock_mhz = measured.clock_mhz;
    if (bandwidth == 0) return;
    result->limit_us = op.bytes / bandwidth * 1e6;
    if (op.unit == OpUnit::kNone) return;
    const auto type = op.unit == OpUnit::kInt8 ? cuda::MatmulType::kInt8 : cuda::MatmulType::kBF16;
    const double rate = measure_->MatrixRate(type, measured.clock_mhz);
    if (rate != 0) result->limit_us = std::max(result->limit_us, op.operations / rate * 1e6);
  }

  void TimeBaselines(const OpCase& op, int replays, OpResult* result) override {
    if (op.k == 0) return;
    const int64_t rows = result->spec.rows;
    const auto us = [&](cuda::MatmulType type) { return measure_->Matmul(type, op.n, op.k, rows, replays).us; };
    result->bf16_us = us(cuda::MatmulType::kBF16);
    if (result->spec.op != "linear") return;  // the others would not keep lm_head's weights
    result->fp8_us = us(cuda::MatmulType::kFP8);
    result->int8_us = us(cuda::MatmulType::kInt8);
  }

 private:
  std::unique_ptr<cuda::Measure> measure_;
};
#endif

}  // namespace

absl::StatusOr<std::unique_ptr<OpMeasure>> CreateOpMeasure(const OpsOptions& options, Ops& ops) {
#ifdef NIBBLE_CUDA
  if (options.backend == "cuda") {
    NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<cuda::Measure> measure, cuda::CreateMeasure(ops));
    return std::make_unique<GpuMeasure>(std::move(measure));
  }
#else
  // The host's clock would time launches, not kernels.
  if (options.backend == "cuda") return absl::UnavailableError("this build cannot measure on a GPU");
#endif
  return std::make_unique<CpuMeasure>();
}

}  // namespace nibble
