// Rows of any type and length that pass through shared memory as f32, where a Hadamard transform and a permutation can
// reach every channel.
#pragma once

#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/code.cuh"
#include "kernels/cuda/rows/hadamard.cuh"
#include "kernels/cuda/rows/plan.h"
#include "kernels/cuda/rows/source.cuh"

namespace nibble::cuda {

// Channels [begin, begin + 8) after the permutation; zeros from k on.
__device__ __forceinline__ void GatherOctet(const float* x, const int32_t* perm, int begin, int k,
                                            float y[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (begin + i >= k) {
      y[i] = 0.0f;
      continue;
    }
    const int channel = perm == nullptr ? begin + i : perm[begin + i];
    if (channel < 0 || channel >= k) __trap();
    y[i] = x[Padded(channel)];
  }
}

// Half a warp takes a block of 128, a thread an octet. Grid: one block per output row. `dense_whole`: octets of the
// dense output are complete and aligned.
template <typename Source>
__global__ void __launch_bounds__(1024)
    CodeRowsInShared(const Source source, const RowCoding coding, const int k, const bool dense_whole) {
  extern __shared__ __align__(16) float x[];
  __shared__ int code_sum;
  const int blocks = (k + kBlockChannels - 1) / kBlockChannels, octets = blocks * kBlockOctets;
  float* const squares = x + blocks * (kBlockChannels + kPadFloats);
  float* const magnitudes = squares + blocks;
  const uint32_t half_warp = LaneMask<kBlockOctets>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  GridDependencyLaunch();
  if (thread == 0) code_sum = 0;
  GridDependencyWait();
  const int64_t row = blockIdx.x;
  int64_t source_row = row;
  if constexpr (Source::kNorm) source_row = source.Row(row);

  const bool hadamard = coding.hadamard > 1;
  for (int o = thread; o < octets; o += threads) {
    float v[kOctet];
    source.Load(source_row, o * kOctet, v);
    if constexpr (Source::kNorm) {
      const float sum = TreeSum<kBlockOctets>(half_warp, SquareChain(v));
      if (o % kBlockOctets == 0) squares[o / kBlockOctets] = sum;
      source.Weigh(o * kOctet, v);
    } else if (hadamard) {
      Butterflies<3>(v, OctetStages(coding.hadamard));
    }
    float4* to = reinterpret_cast<float4*>(x + Padded(o * kOctet));
    to[0] = make_float4(v[0], v[1], v[2], v[3]);
    to[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __syncthreads();

  float multiplier = 1.0f;
  if constexpr (Source::kNorm) {
    float sum = 0.0f;
    for (int b = thread % kBlockOctets; b < blocks; b += kBlockOctets) sum += squares[b];
    multiplier = source.Multiplier(TreeSum<kBlockOctets>(~0u, sum));
    if (hadamard) {
      for (int o = thread; o < octets; o += threads) {
        float v[kOctet];
#pragma unroll
        for (int i = 0; i < kOctet; ++i) v[i] = x[Padded(o * kOctet) + i] * multiplier;
        Butterflies<3>(v, OctetStages(coding.hadamard));
#pragma unroll
        for (int i = 0; i < kOctet; ++i) x[Padded(o * kOctet) + i] = v[i];
      }
      multiplier = 1.0f;
    }
  }
  if (hadamard) FinishHadamard(x, k, coding.hadamard);

  if (coding.codes == nullptr) {
    const RowSpan to = RowAt(coding.dense, row, 0, dense_whole);
    for (int o = thread; o < octets; o += threads) {
      float v[kOctet];
      GatherOctet(x, coding.perm, o * kOctet, k, v);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) v[i] *= multiplier;
      StoreOctet(to, o * kOctet, k, v);
    }
    return;
  }

  float max_wide = 0.0f, max_narrow = 0.0f;
  for (int o = thread; o < octets; o += threads) {
    float v[kOctet];
    GatherOctet(x, coding.perm, o * kOctet, k, v);
    const float magnitude = TreeMaxMagnitude<kBlockOctets>(half_warp, MaxMagnitude(v)) * multiplier;
    if (o % kBlockOctets == 0) magnitudes[o / kBlockOctets] = magnitude;
  }
  __syncthreads();
  for (int b = thread % 32; b < blocks; b += 32) {
    float& max = coding.block_bits[b] == 8 ? max_wide : max_narrow;
    max = MaxMagnitude(max, magnitudes[b]);
  }
  max_wide = TreeMaxMagnitude<32>(~0u, max_wide);
  max_narrow = TreeMaxMagnitude<32>(~0u, max_narrow);
  const RowScale scale = MakeRowScale(ScaleOf(max_wide, max_narrow));

  int sum = 0;
  for (int o = thread; o < octets; o += threads) {
    const int b = o / kBlockOctets, bits = coding.block_bits[b];
    float v[1][kOctet];
    GatherOctet(x, coding.perm, o * kOctet, k, v[0]);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[0][i] *= multiplier;
    uint2 codes[1] = {};
    int exponent = 0;
    if (scale.scale != 0.0f) {
      exponent = scale.plain ? CodeBlock<1, true>(half_warp, v, magnitudes[b], bits, scale, codes)
                             : CodeBlock<1, false>(half_warp, v, magnitudes[b], bits, scale, codes);
    }
    *reinterpret_cast<uint2*>(coding.codes + row * k + o * kOctet) = codes[0];
    sum += SumOfCodes(codes[0]);
    if (coding.exponents != nullptr && o % kBlockOctets == 0) {
      coding.exponents[row * blocks + b] = static_cast<uint8_t>(exponent);
    }
  }
  sum = __reduce_add_sync(~0u, sum);
  if (thread % 32 == 0) atomicAdd(&code_sum, sum);
  __syncthreads();
  if (thread == 0) {
    coding.scales[row] = scale.scale;
    if (coding.code_sums != nullptr) coding.code_sums[row] = code_sum;
  }
}

}  // namespace nibble::cuda
