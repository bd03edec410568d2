// Device order of weights and activations for sm_80 to sm_89. The kernel runs through K with the 4-bit blocks first,
// then the 8-bit ones, each in their order in the checkpoint; a block's place in that order is its step.
//
// Weights: [N/128 row tiles][K/128 steps][8448 bytes], N padded with zeros. A block is 128 rows × 64 bytes of codes as
// in the checkpoint (low nibble = even k), then s2 and m + 128 of each row. Minima once more, m [padded N, depth] s8 for
// the 4-bit steps alone, depth padded to 32 with zeros.
//
// Activations: [units][padded T][64 bytes]. A 4-bit block is one unit: mantissas in the order of the codes that they
// meet. An 8-bit block is two: of each sixteen bytes 16c.. of a row of codes, k = 32c..32c+31, unit 0 holds the first
// sixteen k and unit 1 the others, every eight of them even ones first, as weights are unpacked by masking low and high
// nibbles. So lane 4g + c of a warp finds its operands of a row or token in 16 bytes, at 64 g + 16 c.
//
// Of each token and 4-bit block also the exponent e, [steps][padded T] u8, and the sum of its codes Σ a4 · 2^e, at most
// 2^14, as 128 · high + low: two s8 [padded T, depth].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/gemm_sm80/config.h"
#include "kernels/ops.h"

namespace nibble::cuda::sm80 {

NIBBLE_HOST_DEVICE constexpr int64_t RowTiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }
NIBBLE_HOST_DEVICE constexpr int64_t MinimaDepth(int64_t four_bit_blocks) { return (four_bit_blocks + 31) / 32 * 32; }

struct WeightTarget {
  uint8_t* blocks = nullptr;
  int8_t* minima = nullptr;
  const int32_t* steps = nullptr;  // [K/128] of each block, device memory
  int64_t four_bit_blocks = 0;
};

// Scatters rows in checkpoint order (device pointers, 16-byte aligned; channel_scale and block_bits are not looked at)
// to rows first_row.. of the target, whose padding is the caller's to zero. Asynchronous.
void LaunchWeightLayout(cudaStream_t stream, const W4View& rows, int64_t first_row, const WeightTarget& to);

// What the kernel reads of its input.
struct Activations {
  uint8_t* units = nullptr;
  uint8_t* exponents = nullptr;
  int8_t* high = nullptr;  // of the sums of codes
  int8_t* low = nullptr;
  int64_t padded_tokens = 0;
};

}  // namespace nibble::cuda::sm80
