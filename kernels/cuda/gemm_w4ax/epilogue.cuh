// From int32 sums in registers to output rows in memory.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/ptx/barrier.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda::gemm {

__device__ __forceinline__ void WarpgroupSync(int warpgroup) { BarrierSync<128>(1 + warpgroup); }

__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float RoundBF16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// silu(gate) of values that are bf16 numbers.
__device__ __forceinline__ void Silu(const float (&gate)[4], float (&silu)[4]) {
  if (fminf(fminf(gate[0], gate[1]), fminf(gate[2], gate[3])) < kShortSigmoidFrom) {
#pragma unroll
    for (int i = 0; i < 4; ++i) silu[i] = __fmul_rn(gate[i], Sigmoid(gate[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) silu[i] = __fmul_rn(gate[i], ShortSigmoid(gate[i]));
  }
}

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

// Writes the sums of 64 rows × `tokens` tokens, all threads of a warpgroup together, kStaged tokens at a time: whole lines
// of the output come together in `staging`, shared memory of this warpgroup. `channel` and `token` are the first ones,
// `row_in_vectors` the first row's place in the vectors. Unrolled for the sums' sake, so each kind of output has its own
// code: jumping over another's would miss the instruction cache in every step.
template <GemmOutput kOutput, int kTokens, int kStaged>
__device__ __forceinline__ void StoreBlock(const GemmParams& p, const int32_t* sums, const Vectors& vectors,
                                           int row_in_vectors, int channel, int token, int tokens, uint32_t staging,
                                           int warpgroup, int thread) {
  const int warp = thread / 32, lane = thread % 32, g = lane >> 2, c = lane & 3;
  const int row = row_in_vectors + 16 * warp + g;
  const float2 channel_scale = make_float2(vectors.channel_scale[row], vectors.channel_scale[row + 8]);
  const bool has_bias = p.bias != nullptr;
  const float2 bias = has_bias ? make_float2(vectors.bias[row], vectors.bias[row + 8]) : make_float2(0.0f, 0.0f);
#pragma unroll
  for (int begin = 0; begin < kTokens; begin += kStaged) {
    if (begin >= tokens) break;
#pragma unroll
    for (int t16 = begin; t16 < begin + kStaged && t16 < kTokens; t16 += 16) {
      float y[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = t16 + 8 * h + 2 * c;
        ScaleSums(sums + (t16 / 8 + h) * 4, *reinterpret_cast<const float2*>(vectors.token_scale + t),
                  *reinterpret_cast<const int2*>(vectors.code_sum + t), channel_scale, bias, has_bias, y[h]);
      }
      if constexpr (kOutput == GemmOutput::kBF16) {
        // Two 8 × 8 matrices of tokens × two of channels, transposed on the way. A token's eight pieces of 16 bytes are
        // permuted so that neither side meets bank conflicts.
        const int to_token = (lane >> 4) * 8 + (lane & 7), to_piece = 2 * warp + ((lane >> 3) & 1);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         staging + (t16 - begin + to_token) * 128 + (to_piece ^ (to_token & 7)) * 16),
                     "r"(PackBF16(y[0][0], y[0][1])), "r"(PackBF16(y[0][2], y[0][3])), "r"(PackBF16(y[1][0], y[1][1])),
                     "r"(PackBF16(y[1][2], y[1][3])));
      } else if constexpr (kOutput == GemmOutput::kSiluMul) {
        const float gate[4] = {RoundBF16(y[0][0]), RoundBF16(y[0][1]), RoundBF16(y[1][0]), RoundBF16(y[1][1])};
        float silu[4];
        Silu(gate, silu);
        uint32_t h[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          h[i] = PackBF16(__fmul_rn(silu[2 * i], RoundBF16(y[i][2])), __fmul_rn(silu[2 * i + 1], RoundBF16(y[i][3])));
        }
        const int to_token = lane & 15;
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                         staging + (t16 - begin + to_token) * 64 + (warp ^ (to_token >> 1 & 3)) * 16),
                     "r"(h[0]), "r"(h[1]));
      } else {
        const int n = channel + 16 * warp;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int t = t16 + 8 * (i / 4) + 2 * c + i % 2, column = n + g + 8 * (i / 2 % 2);
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
    if constexpr (kOutput == GemmOutput::kBF16) {
      WarpgroupSync(warpgroup);
      const int piece = thread % 8, column = channel + piece * 8;
#pragma unroll
      for (int i = 0; i < kStaged && begin + i < kTokens; i += 16) {
        const int from_token = i + thread / 8, t = begin + from_token;
        const uint4 eight = LoadShared128(staging + from_token * 128 + (piece ^ (from_token & 7)) * 16);
        if (t < tokens && column < p.n) {
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + int64_t{token + t} * p.n + column) = eight;
        }
      }
      WarpgroupSync(warpgroup);
    } else if constexpr (kOutput == GemmOutput::kSiluMul) {
      WarpgroupSync(warpgroup);
      const int piece = thread % 4, column = channel + piece * 16;
#pragma unroll
      for (int i = 0; i < kStaged && begin + i < kTokens; i += 32) {
        const int from_token = i + thread / 4, t = begin + from_token;
        if (from_token < kStaged && t < tokens && column < p.n) {
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + (int64_t{token + t} * p.n + column) / 2) =
              LoadShared128(staging + from_token * 64 + (piece ^ (from_token >> 1 & 3)) * 16);
        }
      }
      WarpgroupSync(warpgroup);
    }
  }
}

}  // namespace nibble::cuda::gemm
