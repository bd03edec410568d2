#include "kernels/cuda/gemm_sm80/gemm.h"

#include <algorithm>
#include <utility>

#include "kernels/cuda/gemm_sm80/kernel.h"
#include "kernels/cuda/gemm_sm80/layout.h"
#include "kernels/cuda/gemm_sm80/plan.h"

namespace nibble::cuda::sm80 {
namespace {

// Rows of one launch: enough to keep the tensor cores busy, few enough for their arranged copy to stay small.
constexpr int64_t kMostRows = 2048;

constexpr int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Sizes of the parts of scratch memory, in their order there.
struct ScratchParts {
  int64_t units, exponents, sums, arrivals, partials;

  int64_t total() const { return units + exponents + 2 * sums + arrivals + partials; }
};
ScratchParts PartsOf(int64_t four_bit_blocks, int64_t eight_bit_blocks, int64_t padded_tokens,
                     int64_t stream_tiles, int64_t partial_bytes) {
  return {.units = Aligned((four_bit_blocks + 2 * eight_bit_blocks) * padded_tokens * kUnitBytes),
          .exponents = Aligned(four_bit_blocks * padded_tokens),
          .sums = Aligned(padded_tokens * MinimaDepth(four_bit_blocks)),
          .arrivals = Aligned(stream_tiles * 4),
          .partials = partial_bytes};
}

void Run(const Device& device, const LinearArgs& args, int64_t first, int64_t rows) {
  const auto& weight = static_cast<const W4AxWeight&>(*args.weight);
  const LinearInput& input = args.input;
  const int64_t blocks = weight.k / kDepthBlock, eight_bit_blocks = blocks - weight.four_bit_blocks;
  const GemmPlan plan = PickGemmPlan({.n = weight.n,
                                      .rows = rows,
                                      .four_bit_blocks = weight.four_bit_blocks,
                                      .eight_bit_blocks = eight_bit_blocks,
                                      .multiprocessors = device.multiprocessors});
  const ScratchParts parts = PartsOf(weight.four_bit_blocks, eight_bit_blocks, plan.PaddedTokens(),
                                     plan.split.stream_tiles(), plan.PartialBytes());
  uint8_t* scratch = device.Scratch<uint8_t>(parts.total());
  auto take = [&](int64_t bytes) { return std::exchange(scratch, scratch + bytes); };
  Activations activations;
  activations.units = take(parts.units);
  activations.exponents = take(parts.exponents);
  activations.high = reinterpret_cast<int8_t*>(take(parts.sums));
  activations.low = reinterpret_cast<int8_t*>(take(parts.sums));
  activations.padded_tokens = plan.PaddedTokens();
  auto* arrivals = reinterpret_cast<int32_t*>(take(parts.arrivals));
  LaunchArrange(device, {.codes = input.codes + first * weight.k,
                         .exponents = input.exponents == nullptr ? nullptr : input.exponents + first * blocks,
                         .steps = weight.steps.as<int32_t>(),
                         .to = activations,
                         .arrivals = arrivals,
                         .num_arrivals = plan.split.stream_tiles(),
                         .rows = rows,
                         .blocks = static_cast<int>(blocks),
                         .four_bit_blocks = static_cast<int>(weight.four_bit_blocks)});
  LaunchGemm(device, plan,
             {.weights = weight.blocks.as<uint8_t>(),
              .minima = weight.minima.as<int8_t>(),
              .input = activations,
              .channel_scale = weight.channel_scale.as<float>(),
              .token_scale = input.scales + first,
              .bias = args.bias,
              .out = static_cast<uint8_t*>(args.out.data) + first * weight.n * SizeOf(args.out.dtype),
              .partials = reinterpret_cast<int32_t*>(take(parts.partials)),
              .arrivals = arrivals,
              .rows = static_cast<int>(rows),
              .n = static_cast<int>(weight.n),
              .depth = static_cast<int>(MinimaDepth(weight.four_bit_blocks)),
              .bf16 = args.out.dtype == DType::kBF16});
}

}  // namespace

int64_t LinearW4AxScratchBytes(int64_t k, int64_t max_rows, int multiprocessors) {
  const int64_t blocks = k / kDepthBlock;
  const int64_t rows = std::min(max_rows, kMostRows);
  const int64_t padded = (rows + kMostTileTokens - 1) / kMostTileTokens * kMostTileTokens;
  // Bounds for every mixture of 4- and 8-bit blocks. The stream has fewer tiles than twice the workers.
  const ScratchParts four = PartsOf(blocks, 0, padded, 0, 0), eight = PartsOf(0, blocks, padded, 0, 0);
  return eight.units + four.exponents + 2 * four.sums + Aligned(int64_t{2} * multiprocessors * 4) +
         int64_t{multiprocessors} * 2 * kTileRows * kMostTileTokens * 4;
}

void LinearW4Ax(const Device& device, const LinearArgs& args) {
  const auto& weight = static_cast<const W4AxWeight&>(*args.weight);
  NIBBLE_CHECK(args.input.codes != nullptr && args.input.scales != nullptr, "a W4Ax linear takes codes and scales");
  NIBBLE_CHECK(weight.four_bit_blocks == 0 || args.input.exponents != nullptr,
               "a W4Ax linear with 4-bit blocks takes exponents");
  for (int64_t first = 0; first < args.input.rows; first += kMostRows) {
    Run(device, args, first, std::min(kMostRows, args.input.rows - first));
  }
}

}  // namespace nibble::cuda::sm80
