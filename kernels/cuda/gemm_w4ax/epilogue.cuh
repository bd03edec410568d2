// From int32 sums in registers to output rows in memory.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda::gemm {

__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float RoundBF16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// Where a warpgroup's scales and biases lie in shared memory: token scales [tokens], 128 · code sums [tokens], channel
// scales [blocks · 64], biases [blocks · 64].
struct Vectors {
  const float* token_scale;
  const int32_t* code_sum;
  const float* channel_scale;
  const float* bias;
};

// Four sums of a fragment as outputs y[i]: channel g + 8 (i / 2), token 2c + i % 2.
__device__ __forceinline__ void ScaleSums(const int32_t* sums, float2 token_scale, int2 code_sum, float2 channel_scale,
                                          float2 bias, bool has_bias, float (&y)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Weights went in as w8 + 128.
    const int32_t sum = sums[i] - 128 * (i % 2 == 0 ? code_sum.x : code_sum.y);
    const float scale = __fmul_rn(i % 2 == 0 ? token_scale.x : token_scale.y, i < 2 ? channel_scale.x : channel_scale.y);
    y[i] = __fmul_rn(__int2float_rn(sum), scale);
    if (has_bias) y[i] = __fadd_rn(y[i], i < 2 ? bias.x : bias.y);
  }
}

// Writes the sums of 64 rows × `tokens` tokens. `channel` and `token` are the first ones, `row_in_vectors` the first
// row's place in the vectors; staging: 1 KB of shared memory of this warp.
template <int kTokens>
__device__ __forceinline__ void StoreBlock(const GemmParams& p, const int32_t* sums, const Vectors& vectors,
                                           int row_in_vectors, int channel, int token, int tokens, uint32_t staging,
                                           int warp) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int row = row_in_vectors + 16 * warp + g;
  const float2 channel_scale = make_float2(vectors.channel_scale[row], vectors.channel_scale[row + 8]);
  const bool has_bias = p.bias != nullptr;
  const float2 bias = has_bias ? make_float2(vectors.bias[row], vectors.bias[row + 8]) : make_float2(0.0f, 0.0f);
  const int n = channel + 16 * warp;
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    if (8 * j >= tokens) break;
    float y[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = 8 * (j + h) + 2 * c;
      ScaleSums(sums + 4 * (j + h), *reinterpret_cast<const float2*>(vectors.token_scale + t),
                *reinterpret_cast<const int2*>(vectors.code_sum + t), channel_scale, bias, has_bias, y[h]);
    }
    const uint32_t patch = staging + (j / 2 % 2) * 512;
    if (p.output == GemmOutput::kBF16) {
      // Two 8 × 8 matrices of tokens × two of channels, transposed on the way so that a lane can store 8 channels.
      const uint32_t to = patch + ((lane >> 4) * 8 + (lane & 7)) * 32 + ((lane >> 3) & 1) * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                   "r"(PackBF16(y[0][0], y[0][1])), "r"(PackBF16(y[0][2], y[0][3])), "r"(PackBF16(y[1][0], y[1][1])),
                   "r"(PackBF16(y[1][2], y[1][3]))
                   : "memory");
      __syncwarp();
      const uint4 eight = LoadShared128(patch + lane * 16);
      const int t = 8 * j + (lane >> 1), column = n + (lane & 1) * 8;
      if (t < tokens && column < p.n) {
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + int64_t{token + t} * p.n + column) = eight;
      }
    } else if (p.output == GemmOutput::kSiluMul) {
      uint32_t h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gate[2] = {RoundBF16(y[i][0]), RoundBF16(y[i][1])};
        h[i] = PackBF16(__fmul_rn(__fmul_rn(gate[0], Sigmoid(gate[0])), RoundBF16(y[i][2])),
                        __fmul_rn(__fmul_rn(gate[1], Sigmoid(gate[1])), RoundBF16(y[i][3])));
      }
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(patch + (lane & 15) * 16),
                   "r"(h[0]), "r"(h[1])
                   : "memory");
      __syncwarp();
      const int t = 8 * j + lane;
      if (lane < 16 && t < tokens && n < p.n) {
        const uint4 eight = LoadShared128(patch + lane * 16);
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + (int64_t{token + t} * p.n + n) / 2) = eight;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int t = 8 * (j + i / 4) + 2 * c + i % 2, column = n + g + 8 * (i / 2 % 2);
        if (t >= tokens || column >= p.n) continue;
        const int64_t at = int64_t{token + t} * p.n + column;
        if (p.output == GemmOutput::kF32) {
          static_cast<float*>(p.out)[at] = y[i / 4][i % 4];
        } else {
          static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(y[i / 4][i % 4]);
        }
      }
    }
  }
  __syncwarp();
}

}  // namespace nibble::cuda::gemm
