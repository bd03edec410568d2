// What a multiplying warpgroup of the prefill kernel does to 64 queries in registers: from the dots of a page to weights
// for V, and from streams to a result.
//
// Thread 32w + 4g + t of a warpgroup holds queries 16w + g and 16w + g + 8 (rows 0 and 1 here): of scores, register
// 4j + 2r + e is token 8j + 2t + e of row r; of outputs, channel 8j + 2t + e. A thread's sums run over tokens 2t and
// 2t + 1 modulo 8, like those of the decode kernel's lanes.
#pragma once

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill_shared.cuh"

namespace nibble::cuda {

template <int kHeadDim>
struct Stream {
  float o[kHeadDim / 2];
  float reference[2];
  float sum[2][2], zero[2][2];  // [row][token % 2]

  // All but o, which a stream's first step of P · V does not read.
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference[r] = -INFINITY;
      sum[r][0] = sum[r][1] = zero[r][0] = zero[r][1] = 0;
    }
  }
};

// ---- a page ----------------------------------------------------------------------------------------------------------

// Scales and zeros, of K or of V, of a thread's tokens, in f16: half the loads and registers for a conversion each.
struct TokenParameters {
  uint4 of[4];

  // Volatile: where it stands in the code decides how many registers wait for it.
  __device__ __forceinline__ void Load(const uint32_t* page, int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) of[i] = LoadShared128(SharedAddress(page + 16 * i + 4 * t));
  }
  // Of tokens 8j + 2t and 8j + 2t + 1: scale, zero, scale, zero.
  __device__ __forceinline__ float4 Of(int j) const {
    const uint4& v = of[j / 2];
    const float2 even = UnpackF16(j % 2 == 0 ? v.x : v.z), odd = UnpackF16(j % 2 == 0 ? v.y : v.w);
    return make_float4(even.x, even.y, odd.x, odd.y);
  }
};

// Scores from dots; page_max[r] is the largest of row r that this thread has. last[r]: the last token of the page, from
// 0 on, that row r sees; negative: none. Only looked at when the page is masked.
template <bool kMasked>
__device__ __forceinline__ void Scores(const float (&dots)[32], const TokenParameters& parameters,
                                       const QueryFactors (&factors)[2], const int (&last)[2], float (&scores)[32],
                                       float (&page_max)[2]) {
  const int t = threadIdx.x % 4;
  page_max[0] = page_max[1] = -INFINITY;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 k = parameters.Of(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, e = i % 2;
      float& score = scores[4 * j + i];
      score = Score(e == 0 ? k.x : k.z, e == 0 ? k.y : k.w, dots[4 * j + i], factors[r].sum);
      if (kMasked && 8 * j + 2 * t + e > last[r]) score = -INFINITY;
      page_max[r] = fmaxf(page_max[r], score);
    }
  }
}

// Of a row's four threads.
__device__ __forceinline__ float RowMax(float largest) {
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
}

// A row's reference moves if the largest score that some thread has moves it.
template <int kHeadDim>
__device__ __forceinline__ void MoveReferences(const float (&page_max)[2], const QueryFactors (&factors)[2],
                                               Stream<kHeadDim>* stream) {
  if (!__any_sync(~0u, ReferenceMoves(page_max[0], stream->reference[0], factors[0].score) ||
                           ReferenceMoves(page_max[1], stream->reference[1], factors[1].score))) {
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = MoveReference(RowMax(page_max[r]), factors[r].score, &stream->reference[r]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      stream->sum[r][e] *= factor;
      stream->zero[r][e] *= factor;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) stream->o[4 * j + 2 * r + e] *= factor;
    }
  }
}

// Scores become probabilities times V's scale, as operands of P · V.
template <int kHeadDim>
__device__ __forceinline__ void Weights(const float (&scores)[32], const TokenParameters& parameters,
                                        const QueryFactors (&factors)[2], Stream<kHeadDim>* stream,
                                        uint32_t (&weights)[4][4]) {
  const float offset[2] = {ExponentOffset(stream->reference[0], factors[0].score),
                           ExponentOffset(stream->reference[1], factors[1].score)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // sixteen tokens: one step of P · V
    float p[2][2][2];            // [token / 8][row][token % 2]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        p[0][r][e] = Exp2(fmaf(scores[8 * i + 2 * r + e], factors[r].score, offset[r]));
        p[1][r][e] = Exp2(fmaf(scores[8 * i + 4 + 2 * r + e], factors[r].score, offset[r]));
        stream->sum[r][e] += p[0][r][e] + p[1][r][e];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = parameters.Of(2 * i + half);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float scaled[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scaled[e] = p[half][r][e] * (e == 0 ? v.x : v.z);
          stream->zero[r][e] = fmaf(p[half][r][e], e == 0 ? v.y : v.w, stream->zero[r][e]);
        }
        weights[i][2 * half + r] = PackF16(scaled[0], scaled[1]);
      }
    }
  }
}

// ---- folds -----------------------------------------------------------------------------------------------------------

// The softmax of a finished stream: sums over all tokens in the order of the decode kernel's lanes.
template <int kHeadDim>
__device__ __forceinline__ void Finish(const Stream<kHeadDim>& stream, const QueryFactors (&factors)[2],
                                       SoftmaxState (&state)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = stream.sum[r][0] + stream.sum[r][1], zero = stream.zero[r][0] + stream.zero[r][1];
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      sum += __shfl_xor_sync(~0u, sum, lanes);
      zero += __shfl_xor_sync(~0u, zero, lanes);
    }
    state[r] = {stream.reference[r] * factors[r].score, sum, zero};
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Keep(const float (&o)[kHeadDim / 2], const SoftmaxState (&state)[2], float4* kept) {
#pragma unroll
  for (int r = 0; r < 2; ++r) kept[r * 32] = make_float4(state[r].max, state[r].sum, state[r].zero, 0);
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    kept[(2 + j) * 32] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
  }
}

// o, state = kept ⊕ o, state.
template <int kHeadDim>
__device__ __forceinline__ void FoldKept(const float4* kept, float (&o)[kHeadDim / 2], SoftmaxState (&state)[2]) {
  FoldFactors factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float4 s = kept[r * 32];
    SoftmaxState into = {s.x, s.y, s.z};
    factors[r] = Fold(&into, state[r]);
    state[r] = into;
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    if (j % 8 == 0) __syncwarp();  // so many loads at a time: there are no registers for more
    const float4 s = kept[(2 + j) * 32];
    o[4 * j] = Fold(s.x, o[4 * j], factors[0]);
    o[4 * j + 1] = Fold(s.y, o[4 * j + 1], factors[0]);
    o[4 * j + 2] = Fold(s.z, o[4 * j + 2], factors[1]);
    o[4 * j + 3] = Fold(s.w, o[4 * j + 3], factors[1]);
  }
}

}  // namespace nibble::cuda
