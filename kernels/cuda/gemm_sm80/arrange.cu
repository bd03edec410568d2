#include "kernels/cuda/gemm_sm80/kernel.h"

namespace nibble::cuda::sm80 {
namespace {

// A warp arranges one block of one token, a lane four codes.
__global__ void __launch_bounds__(kThreads) Arrange(ArrangeParams p) {
  const int lane = threadIdx.x & 31;
  const int64_t token = blockIdx.x;
  const int block = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x >> 5);
  if (token == 0 && blockIdx.y == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < p.num_arrivals; i += kThreads) p.arrivals[i] = 0;
  }
  if (block >= p.blocks) return;
  const int64_t at = token * p.blocks + block, padded = p.to.padded_tokens;
  const int codes = reinterpret_cast<const int*>(p.codes)[at * 32 + lane];
  const int step = p.steps[block];
  if (step >= p.four_bit_blocks) {
    // Even codes, then odd ones, of the eight that this lane and its neighbour hold; word `eight` of the row's sixteen.
    const int eight = lane >> 1, c = eight >> 2, j = eight & 3;
    const int64_t unit = p.four_bit_blocks + 2 * (step - p.four_bit_blocks) + (j >> 1);
    uint8_t* to = p.to.units + (unit * padded + token) * kUnitBytes + 16 * c + 8 * (j & 1) + 2 * (lane & 1);
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(__byte_perm(codes, 0, 0x4420));
    *reinterpret_cast<uint16_t*>(to + 4) = static_cast<uint16_t>(__byte_perm(codes, 0, 0x4431));
    return;
  }
  const int exponent = p.exponents[at];
  uint32_t mantissas = 0;
  int sum = 0;
  bool representable = exponent <= 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = static_cast<int8_t>(codes >> (8 * i)), mantissa = code >> (exponent & 7);
    representable &= mantissa >= -8 && mantissa <= 7 && mantissa << (exponent & 7) == code;
    mantissas |= static_cast<uint32_t>(mantissa & 15) << (4 * i);
    sum += code;
  }
  if (!representable) __trap();
  reinterpret_cast<uint16_t*>(p.to.units + (step * padded + token) * kUnitBytes)[lane] = static_cast<uint16_t>(mantissas);
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (lane == 0) {
    const int high = (sum + 64) >> 7;
    const int64_t to = token * MinimaDepth(p.four_bit_blocks) + step;
    p.to.high[to] = static_cast<int8_t>(high);
    p.to.low[to] = static_cast<int8_t>(sum - 128 * high);
    p.to.exponents[step * padded + token] = static_cast<uint8_t>(exponent);
  }
}

}  // namespace

void LaunchArrange(const Device& device, const ArrangeParams& params) {
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>((params.blocks + kWarps - 1) / kWarps));
  Launch(device, Arrange, grid, kThreads, 0, params);
}

}  // namespace nibble::cuda::sm80
