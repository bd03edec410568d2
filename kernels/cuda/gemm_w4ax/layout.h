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

constexpr int64_t W4AxRowBlocks(int64_t n) { return (n + kRowBlock - 1) / kRowBlock; }
constexpr int64_t W4AxDepthBlocks(int64_t k) { return (k + 2 * kDepthBlock - 1) / (2 * kDepthBlock) * 2; }
constexpr int64_t W4AxBytes(int64_t n, int64_t k) { return W4AxRowBlocks(n) * W4AxDepthBlocks(k) * kW4AxBlockBytes; }

// Where the rows of a part go in the stacked weight.
struct RowPlacement {
  int64_t first = 0;   // row of the part's row 0
  bool interleave = false;  // rows [8i, 8i+8) of part `part` (0 or 1) become rows [16i + 8·part, ...) instead
  int64_t part = 0;
  int64_t part_first = 0;  // rows of the part that came before this view of it
};

// Scatters rows in checkpoint order (device pointers, 16-byte aligned; channel_scale is not looked at) to `blocks`,
// whose padding is the caller's to zero. Asynchronous.
void LaunchW4AxRelayout(cudaStream_t stream, const W4View& rows, const RowPlacement& placement, uint8_t* blocks);

}  // namespace nibble::cuda
