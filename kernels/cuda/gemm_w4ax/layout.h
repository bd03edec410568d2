// Device order of W4Ax weights: what one thread of the kernel needs for one step lies together.
//
// [N/64 row blocks][K/128 depth blocks][4224 bytes], N padded to 64 and K to 256 (zeros). A block is 64 rows × 128 k:
//
//   bytes 0..2047     k 0..63     128 threads × 16 bytes
//   bytes 2048..4095  k 64..127   128 threads × 16 bytes
//   bytes 4096..4223  32 words of scales, word 8w + g: s2 of rows 16w + g and 16w + g + 8, then m + 128 of both
//
// The 16 bytes of thread 32w + 4g + c are four words j = 0..3: row 16w + g + 8 (j mod 2), and for k' = 32 (j / 2) + 4c
// byte y holds the code of k' + y in its low nibble and of k' + 16 + y in its high one. Masking a word, or the word
// shifted by four, and one multiply-add by s2 and m + 128 make a register of wgmma's operand A (ptx/wgmma.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/gemm_w4ax/config.h"
#include "kernels/ops.h"

namespace nibble::cuda {

// Where rows of a part go in the stacked weight.
struct RowPlacement {
  int64_t first = 0;        // row of the part's row 0,
  bool interleave = false;  // or, of two parts: rows [8i, 8i+8) of part `part` become rows [16i + 8 · part, ...)
  int64_t part = 0;
  int64_t part_first = 0;   // rows of an interleaved part before the given ones
};
NIBBLE_HOST_DEVICE constexpr int64_t PlacedRow(const RowPlacement& placement, int64_t row) {
  if (!placement.interleave) return placement.first + row;
  const int64_t in_part = placement.part_first + row;
  return in_part / 8 * 16 + 8 * placement.part + in_part % 8;
}

// Scatters rows in checkpoint order (device pointers, 16-byte aligned; channel_scale is not looked at) to `blocks`,
// whose padding is the caller's to zero. Asynchronous.
void LaunchW4AxRelayout(cudaStream_t stream, const W4View& rows, const RowPlacement& placement, uint8_t* blocks);

}  // namespace nibble::cuda
