// What a thread holds of a row of bf16 whose channels stay where they are, between the pass that finds the row's scale
// and the pass that codes it.
//
// 16 / kOctets neighbouring threads take a block of 128, thread q its octets q, q + 16 / kOctets, ..., so that their
// sums are the tree's first steps.
#pragma once

#include <type_traits>

#include "kernels/cuda/rows/code_table.cuh"
#include "kernels/cuda/rows/hadamard.cuh"
#include "kernels/cuda/rows/row_state.cuh"

namespace nibble::cuda {

// Where a unit's codes and exponent go.
struct UnitPlace {
  __device__ __forceinline__ int8_t* Codes() const { return coding.codes + row * k + column; }
  __device__ __forceinline__ uint8_t* Exponent() const {
    if (coding.exponents == nullptr) return nullptr;
    return coding.exponents + row * (k / kBlockChannels) + column / kBlockChannels;
  }

  const RowCoding& coding;
  int64_t row;
  int k, column;
};

// A thread's part of one block. All threads of a warp call its methods together; `has` is false for those without one.
template <typename Source, int kOctets>
struct Unit {
  static constexpr int kThreads = kBlockOctets / kOctets;  // of a block
  static constexpr int kStep = kThreads * kOctet;          // channels between a thread's octets
  static constexpr bool kF32 = Source::kNorm || Source::kHadamard;
  using Octets = std::conditional_t<kF32, float[kOctets][kOctet], uint4[kOctets]>;
  static_assert(!Source::kHadamard || kOctets == 2);

  // fetch(o) is the o-th octet as the source fetches it, weights(o) the norm's.
  template <typename Fetch, typename Weights>
  __device__ __forceinline__ void Take(bool has, int column, const Source& source, const typename Source::RowView& view,
                                       const Fetch& fetch, const Weights& weights) {
    magnitude = 0;
    squares = 0.0f;
    if (has) {
      if constexpr (Source::kNorm) {
        float chains[kOctets], most = 0.0f;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          chains[o] = source.Finish(fetch(o), weights(o), view, column + o * kStep, octets[o]);
          most = MaxMagnitude(most, MaxMagnitude(octets[o]));
        }
        squares = TreeSumOfOctets(chains);
        magnitude = __float_as_uint(most);
      } else {
        typename Source::Fetched fetched[kOctets];
#pragma unroll
        for (int o = 0; o < kOctets; ++o) fetched[o] = fetch(o);
        uint4 packed[kOctets];
        source.Finish(fetched, packed);
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          if constexpr (kF32) {
            Unpack(packed[o], octets[o]);
          } else {
            octets[o] = packed[o];
          }
        }
        if constexpr (!kF32) magnitude = __float_as_uint(MaxMagnitude(octets));
      }
    }
    if constexpr (Source::kHadamard) {
      WarpHadamard(octets, source.hadamard);
      if (has) magnitude = __float_as_uint(MaxMagnitude(MaxMagnitude(octets[0]), MaxMagnitude(octets[1])));
    }
    magnitude = TreeMax<kThreads>(magnitude);
    if constexpr (Source::kNorm) squares = TreeSum<kThreads>(squares);
  }

  // Codes the unit, writes codes and exponent where place.Codes() and place.Exponent() say (the thread's first octet;
  // null: nowhere), and returns the sum of the thread's codes. Of f32, or of a plain row.
  template <typename Place>
  __device__ __forceinline__ int Code(bool has, float multiplier, const RowScale& row, const Place& place) const {
    const float amax = __uint_as_float(magnitude) * multiplier;
    const auto values = [&](int o, float(&x)[kOctet]) {
      if constexpr (kF32) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) x[i] = octets[o][i] * multiplier;
      } else {
        Unpack(octets[o], x);
      }
    };
    uint2 codes[kOctets] = {};
    if (row.scale == 0.0f) return Store(has, codes, 0, place);
    if (row.plain) {
      int sum = 0;
      const int exponent = CodePlainBlock<kOctets>(values, amax, bits, row, [&](int o, const uint2& octet) {
        if (!has) return;
        *reinterpret_cast<uint2*>(place.Codes() + o * kStep) = octet;
        sum += SumOfCodes(octet);
      });
      StoreExponent(has, exponent, place);
      return sum;
    }
    if constexpr (kF32) {
      const int exponent = CodeBlock<kOctets>(values, amax, bits, row, codes);
      return Store(has, codes, exponent, place);
    }
    return 0;
  }

  // The same of bf16 in a row that is not plain. `by_table`: some block of the thread block has 4 bits.
  template <typename Place>
  __device__ __forceinline__ int CodeByTable(bool has, const TableBlock& block, const RowScale& row, bool by_table,
                                             const CodeTable& table, const Place& place) const {
    uint2 codes[kOctets] = {};
    int exponent = 0;
    if (bits == 8) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) codes[o] = CodeWideOctet(octets[o], row);
    }
    if (by_table) exponent = CodeNarrowBlock<kOctets>(bits == 4, octets, block, row, table, codes);
    return Store(has, codes, exponent, place);
  }

  template <typename Place>
  static __device__ __forceinline__ int Store(bool has, const uint2 (&codes)[kOctets], int exponent,
                                              const Place& place) {
    if (!has) return 0;
    int sum = 0;
    int8_t* const to = place.Codes();
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      *reinterpret_cast<uint2*>(to + o * kStep) = codes[o];
      sum += SumOfCodes(codes[o]);
    }
    StoreExponent(has, exponent, place);
    return sum;
  }

  template <typename Place>
  static __device__ __forceinline__ void StoreExponent(bool has, int exponent, const Place& place) {
    if (!has || threadIdx.x % kThreads != 0) return;
    if (uint8_t* const to = place.Exponent(); to != nullptr) *to = static_cast<uint8_t>(exponent);
  }

  Octets octets;
  uint32_t magnitude;  // bits of the block's largest, before the row's multiplier
  float squares;       // of the block, for a norm
  int bits = 0;        // 4 or 8; 0 without a block
};

// The largest magnitudes of 8-bit and of 4-bit blocks.
struct Maxima {
  uint32_t wide = 0, narrow = 0;

  __device__ __forceinline__ void Add(uint32_t magnitude, int bits) {
    if (bits == 8) wide = max(wide, magnitude);
    if (bits == 4) narrow = max(narrow, magnitude);
  }
  // Of all threads of the warp together.
  __device__ __forceinline__ void OfWarp() {
    wide = __reduce_max_sync(~0u, wide);
    narrow = __reduce_max_sync(~0u, narrow);
  }
};

// The first warp finds a row's multiplier and scale from the sums of its blocks and the maxima of `warps` warps.
template <typename Source>
__device__ __forceinline__ void FindScale(const Source& source, const uint32_t* squares, int blocks,
                                          const Maxima* maxima, int warps, RowResult* result) {
  const int lane = static_cast<int>(threadIdx.x);
  float multiplier = 1.0f;
  if constexpr (Source::kNorm) {
    float sum = 0.0f;
#pragma unroll 4
    for (int b = lane % kBlockOctets; b < blocks; b += kBlockOctets) sum += __uint_as_float(squares[b]);
    multiplier = source.Multiplier(TreeSum<kBlockOctets>(sum));
  }
  Maxima most;
#pragma unroll 1
  for (int w = lane; w < warps; w += 32) {
    most.wide = max(most.wide, maxima[w].wide);
    most.narrow = max(most.narrow, maxima[w].narrow);
  }
  most.OfWarp();
  if (lane == 0) {
    result->multiplier = multiplier;
    result->scale = ScaleOfMaxima(most.wide, most.narrow, multiplier);
  }
}

}  // namespace nibble::cuda
