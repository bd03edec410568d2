// The arithmetic of an attention row, shared by the decode and the prefill kernel so that both give the same bits.
//
// A context is cut at fixed token positions. A page (64 tokens) is attended at once. Pages i, i + 4, i + 8, i + 12 of a
// chunk (16 pages) form stream i: one chain of tensor-core steps into one set of accumulators, rescaled page by page.
// Streams are folded left to right into their chunk, chunks into their group (4 chunks), groups into the result.
//
// Everything that could differ between kernels is one function here: the query's operand bits, the score, when the
// reference of the exponentials moves, the fold, the output. Products and sums are fused only where written so.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx/mma.h"

namespace nibble::cuda {

// Codes as f16 operands without arithmetic: a nibble in the lowest bits of an f16 is the subnormal code · 2^-24, one
// nibble higher code · 2^-20. Tensor cores multiply subnormals exactly.
inline constexpr uint32_t kLowNibbles = 0x000f000fu;
inline constexpr uint32_t kHighNibbles = 0x00f000f0u;
inline constexpr float kLowNibbleUnit = 16777216.0f;  // 2^24: accumulators of V channels that come from low nibbles
inline constexpr float kHighNibbleUnit = 1048576.0f;  // 2^20: and from high ones

// The reference of a row's exponentials moves only when a score exceeds it by this power of two: so probabilities are
// at most 8, and with a V scale up to 8188 (a range past that of f16) their product fits an f16.
inline constexpr float kLazyBits = 3.0f;

// ---- query -----------------------------------------------------------------------------------------------------------

// A query head as operands: normalized by a power of two so that f16 holds its bf16 values exactly (down to 2^-24 of
// the largest), and multiplied by 16 where it meets low nibbles.
struct QueryFactors {
  float score;  // C: exponent of 2 per unit of score
  float sum;    // Σ_d q_d in units of the scores
};

// Eight consecutive channels of one head per lane, in D/8 neighbouring lanes. Returns the lane's operand words of the
// k-steps that meet the low and high nibbles of K's word: {0, 4}·16, {1, 5}, {2, 6}·16, {3, 7}.
template <int kHeadDim>
__device__ __forceinline__ uint4 PrepareQuery(uint4 bf16x8, float scale_log2e, QueryFactors* factors) {
  const uint32_t words[4] = {bf16x8.x, bf16x8.y, bf16x8.z, bf16x8.w};
  float q[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    q[2 * i] = __uint_as_float(words[i] << 16);
    q[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(q[i]));
  float sum = ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]));
#pragma unroll
  for (int lanes = 1; lanes < kHeadDim / 8; lanes *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    sum += __shfl_xor_sync(~0u, sum, lanes);
  }
  // Largest magnitude into [2^9, 2^10); subnormal and zero heads by the largest factor whose inverse is normal enough.
  int exponent = 9 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127);
  if (exponent > 100) exponent = 100;
  const float up = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
  const float down = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= up;
  factors->score = scale_log2e * down * kHighNibbleUnit;
  factors->sum = sum * up * (1.0f / kHighNibbleUnit);
  return make_uint4(PackF16(q[0] * 16.0f, q[4] * 16.0f), PackF16(q[1], q[5]), PackF16(q[2] * 16.0f, q[6] * 16.0f),
                    PackF16(q[3], q[7]));
}

// ---- softmax ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float Score(float k_scale, float k_zero, float dot, float query_sum) {
  return fmaf(k_scale, dot, k_zero * query_sum);
}

// Whether a page's largest score moves the row's reference, and the factor for what has been accumulated.
__device__ __forceinline__ bool ReferenceMoves(float page_max, float reference, float score_factor) {
  return (page_max - reference) * score_factor > kLazyBits;
}
__device__ __forceinline__ float MoveReference(float page_max, float score_factor, float* reference) {
  if (!ReferenceMoves(page_max, *reference, score_factor)) return 1.0f;
  const float factor = Exp2((*reference - page_max) * score_factor);
  *reference = page_max;
  return factor;
}

// What to add to score · score_factor before Exp2. A row that has seen nothing yet (-inf) subtracts 0, not -inf.
__device__ __forceinline__ float ExponentOffset(float reference, float score_factor) {
  return reference == -INFINITY ? 0.0f : -(reference * score_factor);
}

// ---- folding ---------------------------------------------------------------------------------------------------------

// Softmax state of a row: reference (in exponents of 2), Σ p, Σ p · zero of V.
struct SoftmaxState {
  float max, sum, zero;
};

// into = into ⊕ state; the factors are for the accumulators: into · keep + state · add.
struct FoldFactors {
  float keep, add;
};
__device__ __forceinline__ FoldFactors Fold(SoftmaxState* into, const SoftmaxState& state) {
  const float high = fmaxf(into->max, state.max);
  const float base = high == -INFINITY ? 0.0f : high;
  const FoldFactors factors = {Exp2(into->max - base), Exp2(state.max - base)};
  into->max = high;
  into->sum = fmaf(into->sum, factors.keep, state.sum * factors.add);
  into->zero = fmaf(into->zero, factors.keep, state.zero * factors.add);
  return factors;
}
__device__ __forceinline__ float Fold(float into, float accumulator, const FoldFactors& factors) {
  return fmaf(into, factors.keep, accumulator * factors.add);
}

// Output from a folded accumulator; `unit` by the nibble that the channel's code lies in.
__device__ __forceinline__ float Output(float accumulator, float unit, float zero, float inverse_sum) {
  return fmaf(accumulator, unit, zero) * inverse_sum;
}

__device__ __forceinline__ float2 UnpackF16(uint32_t halves) {
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace nibble::cuda
