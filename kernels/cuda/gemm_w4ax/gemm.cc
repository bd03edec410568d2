#include "kernels/cuda/gemm_w4ax/gemm.h"

#include <array>
#include <utility>

#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/gemm_w4ax/launch.h"
#include "kernels/cuda/gemm_w4ax/layout.h"
#include "kernels/cuda/gemm_w4ax/plan.h"

namespace nibble::cuda {
namespace {

void Run(const Device& device, const LinearArgs& args, bool silu_mul) {
  const auto& weight = static_cast<const W4AxWeight&>(*args.weight);
  const LinearInput& input = args.input;
  NIBBLE_CHECK(weight.gate_up == silu_mul, "gate and up are interleaved exactly where SiLU · mul follows");
  NIBBLE_CHECK(input.codes != nullptr && input.scales != nullptr && input.code_sums != nullptr,
               "a W4Ax linear takes codes, scales and code sums");
  if (input.rows == 0) return;
  const GemmPlan plan = PickGemmPlan(
      {.n = weight.n, .k = weight.k, .rows = input.rows, .multiprocessors = device.multiprocessors});
  GemmOutput output = GemmOutput::kF32;
  if (args.out.dtype == DType::kBF16) {
    const bool aligned = weight.n % 8 == 0 && reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0;
    NIBBLE_CHECK(aligned || !silu_mul, "output rows of gate and up are 16-byte aligned");
    output = silu_mul ? GemmOutput::kSiluMul : aligned ? GemmOutput::kBF16 : GemmOutput::kAnyBF16;
  }
  NIBBLE_CHECK(!silu_mul || (output == GemmOutput::kSiluMul && args.bias == nullptr),
               "SiLU · mul is computed in bf16, without bias");
  LaunchGemm(device, plan, input.codes, weight.k,
             {.weights = weight.blocks.as<uint8_t>(),
              .channel_scale = weight.channel_scale.as<float>(),
              .token_scale = input.scales,
              .code_sums = input.code_sums,
              .bias = args.bias,
              .out = args.out.data,
              .partials = device.Scratch<int32_t>(plan.PartialBytes()),
              .arrivals = weight.arrivals.as<int32_t>(),
              .rows = static_cast<int>(input.rows),
              .n = static_cast<int>(weight.n),
              .output = output});
}

}  // namespace

int64_t LinearW4AxScratchBytes(int64_t n, int64_t k, int64_t max_rows, int multiprocessors) {
  // Any number of rows up to the largest may be launched, so the bound is over configurations, not over one plan.
  int64_t most = 0;
  for (int64_t rows = 1;; rows = rows * 2 < max_rows ? rows * 2 : max_rows) {
    for (const GemmPlan& plan : EnumerateGemmPlans({n, k, rows, multiprocessors})) {
      if (plan.PartialBytes() > most) most = plan.PartialBytes();
    }
    if (rows == max_rows) return most;
  }
}

void LinearW4Ax(const Device& device, const LinearArgs& args) { Run(device, args, false); }

void LinearSiluMulW4Ax(const Device& device, const LinearArgs& args) { Run(device, args, true); }

}  // namespace nibble::cuda
