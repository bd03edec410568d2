// Rows of any type and length that wait in shared memory as f32, where a Hadamard transform and a permutation can reach
// every channel.
#pragma once

#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/hadamard.cuh"
#include "kernels/cuda/rows/row_state.cuh"

namespace nibble::cuda {

// Code i's value before the multiplier, for i in [begin, begin + 8); zeros from k on. A permutation that leaves the row
// reads outside shared memory, which the device reports.
template <bool kPadded>
__device__ __forceinline__ void GatherOctet(const float* x, const int32_t* perm, int begin, int k, float y[kOctet]) {
  const auto at = [](int channel) { return kPadded ? Padded(channel) : channel; };
  if (perm == nullptr) {
    const float4* from = reinterpret_cast<const float4*>(x + at(begin));  // zeros past k
    const float4 low = from[0], high = from[1];
    y[0] = low.x, y[1] = low.y, y[2] = low.z, y[3] = low.w;
    y[4] = high.x, y[5] = high.y, y[6] = high.z, y[7] = high.w;
  } else if (k % kOctet == 0 && begin < k) {
    const int4* from = reinterpret_cast<const int4*>(perm + begin);
    const int4 low = from[0], high = from[1];
    y[0] = x[at(low.x)], y[1] = x[at(low.y)], y[2] = x[at(low.z)], y[3] = x[at(low.w)];
    y[4] = x[at(high.x)], y[5] = x[at(high.y)], y[6] = x[at(high.z)], y[7] = x[at(high.w)];
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) y[i] = begin + i < k ? x[at(perm[begin + i])] : 0.0f;
  }
}

// Half a warp takes a block of 128, a thread an octet. Grid: one block per output row. `dense_whole`: octets of the
// dense output are complete and aligned.
template <typename Source, bool kHadamard>
__global__ void __maxnreg__(kHadamard ? 64 : 56)
    CodeF32Rows(const Source source, const RowCoding coding, const int k, const bool dense_whole) {
  extern __shared__ __align__(16) float x[];
  __shared__ RowResult result;
  const int blocks = (k + kBlockChannels - 1) / kBlockChannels, octets = blocks * kBlockOctets;
  const int warp_octets = (octets + 31) / 32 * 32;  // loops that exchange values run with whole warps
  BlockState* const states = reinterpret_cast<BlockState*>(x + blocks * (kBlockChannels + (kHadamard ? kPadFloats : 0)));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  GridDependencyLaunch();
  GridDependencyWait();
  const int64_t row = blockIdx.x;
  int64_t source_row = row;
  if constexpr (Source::kNorm) source_row = source.Row(row);
  for (int o = thread; o < warp_octets; o += threads) {
    float v[kOctet] = {};
    if (o < octets) source.Load(source_row, o * kOctet, v);
    if constexpr (Source::kNorm) {
      const float squares = TreeSum<kBlockOctets>(SquareChain(v));
      if (o < octets && o % kBlockOctets == 0) states[o / kBlockOctets].squares = squares;
      source.Weigh(o * kOctet, v);
    } else if constexpr (kHadamard) {
      OctetButterflies(v, coding.hadamard);
    }
    if (o >= octets) continue;
    float4* to = reinterpret_cast<float4*>(x + (kHadamard ? Padded(o * kOctet) : o * kOctet));
    to[0] = make_float4(v[0], v[1], v[2], v[3]);
    to[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __syncthreads();
  if (thread < 32) {
    const float multiplier = MultiplierOf(source, states, blocks);
    if (thread == 0) result.multiplier = multiplier;
  }
  __syncthreads();
  float multiplier = result.multiplier;

  if constexpr (kHadamard) {
    if constexpr (Source::kNorm) {
      for (int o = thread; o < octets; o += threads) {
        float v[kOctet];
        GatherOctet<true>(x, nullptr, o * kOctet, k, v);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) v[i] *= multiplier;
        OctetButterflies(v, coding.hadamard);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) x[Padded(o * kOctet) + i] = v[i];
      }
      __syncthreads();
      multiplier = 1.0f;
    }
    FinishHadamard(x, k, coding.hadamard);
  }

  if (coding.codes == nullptr) {
    const RowSpan to = RowAt(coding.dense, row, 0, dense_whole);
    for (int o = thread; o < octets; o += threads) {
      float v[kOctet];
      GatherOctet<kHadamard>(x, coding.perm, o * kOctet, k, v);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) v[i] *= multiplier;
      StoreOctet(to, o * kOctet, k, v);
    }
    return;
  }

  // Neighbouring threads take a block of 128, thread q its octet q, or q and q + 8: that is less to do per block, but a
  // norm's rows are too short to keep all threads busy so.
  constexpr int kUnitOctets = Source::kNorm ? 1 : 2;
  constexpr int kUnitThreads = kBlockOctets / kUnitOctets, kStep = kUnitThreads * kOctet;
  const int units = blocks * kUnitThreads, warp_units = (units + 31) / 32 * 32;
  const auto gather = [&](int unit, int o, float(&v)[kOctet]) {
    const int begin = unit / kUnitThreads * kBlockChannels + unit % kUnitThreads * kOctet + o * kStep;
    GatherOctet<kHadamard>(x, coding.perm, begin, k, v);
  };
  for (int u = thread; u < warp_units; u += threads) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int o = 0; o < kUnitOctets; ++o) {
      float v[kOctet];
      if (u >= units) continue;
      gather(u, o, v);
      magnitude = max(magnitude, __float_as_uint(MaxMagnitude(v)));
    }
    magnitude = TreeMax<kUnitThreads>(magnitude);
    if (u < units && u % kUnitThreads == 0) {
      states[u / kUnitThreads].magnitude = magnitude;
      states[u / kUnitThreads].bits = coding.block_bits[u / kUnitThreads];
    }
  }
  __syncthreads();
  if (thread < 32) {
    const RowScale scale = ScaleOfRow(states, blocks, multiplier);
    if (thread == 0) result.scale = scale, result.code_sum = 0;
  }
  __syncthreads();

  const RowScale scale = result.scale;
  int sum = 0;
  for (int u = thread; u < warp_units; u += threads) {
    const int b = min(u, units - 1) / kUnitThreads;
    uint2 codes[kUnitOctets] = {};
    int exponent = 0;
    if (scale.scale != 0.0f) {
      const auto values = [&](int o, float(&v)[kOctet]) {
        gather(min(u, units - 1), o, v);
#pragma unroll
        for (float& value : v) value *= multiplier;
      };
      const auto take = [&](int o, const uint2& octet) { codes[o] = octet; };
      const float amax = __uint_as_float(states[b].magnitude) * multiplier;
      exponent = scale.plain ? CodePlainBlock<kUnitOctets>(values, amax, states[b].bits, scale, take)
                             : CodeBlock<kUnitOctets>(values, amax, states[b].bits, scale, codes);
    }
    if (u >= units) continue;
    int8_t* const to = coding.codes + row * k + b * kBlockChannels + u % kUnitThreads * kOctet;
#pragma unroll
    for (int o = 0; o < kUnitOctets; ++o) {
      *reinterpret_cast<uint2*>(to + o * kStep) = codes[o];
      sum += SumOfCodes(codes[o]);
    }
    if (coding.exponents != nullptr && u % kUnitThreads == 0) {
      coding.exponents[row * blocks + b] = static_cast<uint8_t>(exponent);
    }
  }
  FinishRow(coding, row, scale.scale, sum, &result.code_sum);
}

}  // namespace nibble::cuda
