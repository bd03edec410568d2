// Where top-k, top-p and the best log-probabilities end: the smallest member of the shortest prefix whose weight reaches
// a target, found by histograms over ever narrower ranges, so without a sort.
//
// Members are compared by their order: the value's ordered bits, then V - 1 - id. Orders are distinct integers, the
// largest is the best, and ties need no care. The first histogram is linear in the value: the leading bits of floats would crowd
// most ids into a few bins, whose updates then wait for each other.
#pragma once

#include <cstdint>

#include "kernels/cuda/math.cuh"
#include "kernels/cuda/sampling/row_cluster.cuh"

namespace nibble::cuda {

inline constexpr int kBins = kSampleThreads;  // a thread looks after one
inline constexpr int kBinBits = 9;
static_assert(1 << kBinBits == kBins);
inline constexpr float kBinsPerUnit = 16;     // of the first histogram, which so spans 32 below the best

__device__ __forceinline__ float MinusInfinity() { return __int_as_float(0xff800000); }

// Orders as the floats do, -0 as +0.
__device__ __forceinline__ uint32_t OrderedKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float ValueOfKey(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// Probability relative to the best, in units of 2^-40: an integer, so that sums have no order.
__device__ __forceinline__ uint64_t MassOf(float z) { return static_cast<uint64_t>(Exp(z) * 0x1p40f); }

// This block's part of the row.
struct Segment {
  float* values;    // shared or scratch memory
  int count;        // valid ones
  int begin;        // id of the first
  int vocab;
  int id_bits;      // V - 1 fits

  __device__ uint64_t Order(uint32_t key, int id) const {
    return (static_cast<uint64_t>(key) << id_bits) | static_cast<uint32_t>(vocab - 1 - id);
  }
  __device__ uint64_t OrderAt(int i) const { return Order(OrderedKey(values[i]), begin + i); }
  __device__ uint32_t KeyOf(uint64_t order) const { return static_cast<uint32_t>(order >> id_bits); }
  __device__ int IdOf(uint64_t order) const {
    return vocab - 1 - static_cast<int>(order & ((uint64_t{1} << id_bits) - 1));
  }
};

struct CutMemory {
  unsigned long long bins[2][kBins];  // used in turn, as ReduceMemory's slots
  unsigned long long warps[kSampleWarps];
  unsigned long long above, inside;
  int chosen;
};

class CutFinder {
 public:
  __device__ CutFinder(CutMemory* memory, const RowCluster& cluster, const Segment& segment)
      : m_(memory), cluster_(cluster), segment_(segment) {}

  // Order of the last member of the first `count` of the row, 1 <= count <= V. max: the row's largest value.
  __device__ uint64_t OfCount(int count, float max) { return Find<false>(count, max, 0); }

  // The same for the shortest prefix with `fraction` of the mass, among members of at least order `floor`; the values'
  // largest is 0.
  __device__ uint64_t OfMass(double fraction, uint64_t floor) { return Find<true>(fraction, 0.0f, floor); }

 private:
  template <bool kMass>
  __device__ uint64_t Find(double wanted, float max, uint64_t floor) {
    // First histogram: bin = floor(max · 16) - floor(x · 16), exact where the best is not huge.
    const Segment s = segment_;  // in registers, whatever the updates of bins might alias
    const float top = floorf(max * kBinsPerUnit);
    const bool linear = fabsf(top) < 0x1p20f;
    unsigned long long* bins = Clear();
    unsigned long long last = 0;
    for (int i = threadIdx.x; i < s.count; i += kSampleThreads) {
      const float x = s.values[i];
      if (s.OrderAt(i) < floor) continue;
      const uint64_t weight = kMass ? MassOf(x) : 1;
      if (weight == 0) continue;
      const float distance = linear ? top - floorf(x * kBinsPerUnit) : kBins;
      if (distance < kBins - 1) {
        atomicAdd(&bins[static_cast<int>(distance)], weight);
      } else {
        last += weight;  // everything far below the best, usually most of the row: not through one address
      }
    }
    last = RowCluster::WarpReduce(last, Add());
    if (threadIdx.x % 32 == 0 && last != 0) atomicAdd(&bins[kBins - 1], last);
    double target = wanted;
    int bin = Choose(bins, 0, kMass, &target);
    uint64_t low = 0, high = ~uint64_t{0} >> (32 - s.id_bits);
    if (linear) {
      const float end = (top - static_cast<float>(bin) + 1) / kBinsPerUnit;  // the bin's values are below
      high = (static_cast<uint64_t>(OrderedKey(end)) << s.id_bits) - 1;
      if (bin < kBins - 1) low = static_cast<uint64_t>(OrderedKey(end - 1 / kBinsPerUnit)) << s.id_bits;
    }
    low = low > floor ? low : floor;

    while (low < high && !Single<kMass>(low, high)) {
      const int bits = 64 - __clzll(static_cast<long long>(high - low));
      const int shift = bits > kBinBits ? bits - kBinBits : 0;
      bins = Clear();
      for (int i = threadIdx.x; i < s.count; i += kSampleThreads) {
        const uint64_t order = s.OrderAt(i);
        if (order < low || order > high) continue;
        const uint64_t weight = kMass ? MassOf(s.values[i]) : 1;
        if (weight != 0) atomicAdd(&bins[(high - order) >> shift], weight);
      }
      bin = Choose(bins, m_->above, false, &target);
      high -= static_cast<uint64_t>(bin) << shift;
      const uint64_t width = (uint64_t{1} << shift) - 1;
      if (high - low > width) low = high - width;
    }
    return low;
  }

  // Whether the chosen bin holds one member only.
  template <bool kMass>
  __device__ bool Single(uint64_t low, uint64_t high) const {
    if (!kMass) return m_->inside == 1;
    const uint32_t key = segment_.KeyOf(high);
    return segment_.KeyOf(low) == key && m_->inside == MassOf(ValueOfKey(key));
  }

  __device__ unsigned long long* Clear() {
    turn_ ^= 1;
    m_->bins[turn_][threadIdx.x] = 0;
    __syncthreads();
    return m_->bins[turn_];
  }

  // The first bin with which the weight reaches the target; leaves in memory the weight above it and its own. of_total:
  // the target is a fraction of all the weight.
  __device__ int Choose(const unsigned long long* bins, unsigned long long above, bool of_total, double* target) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    cluster_.Sync();
    unsigned long long own = 0;
    for (int rank = 0; rank < cluster_.size(); ++rank) own += cluster_.Of(bins, rank)[threadIdx.x];
    unsigned long long sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) m_->warps[warp] = sum;
    __syncthreads();
    unsigned long long before = above, total = above;
    for (int w = 0; w < kSampleWarps; ++w) {
      before += w < warp ? m_->warps[w] : 0;
      total += m_->warps[w];
    }
    if (of_total) *target *= static_cast<double>(total);
    if (*target < 1) *target = 1;  // at least the best
    sum += before;
    // Weights are integers and the target is at most their total, so exactly one thread finds itself here.
    if (static_cast<double>(sum) >= *target && !(static_cast<double>(sum - own) >= *target)) {
      m_->chosen = threadIdx.x;
      m_->above = sum - own;
      m_->inside = own;
    }
    __syncthreads();
    return m_->chosen;
  }

  CutMemory* m_;
  const RowCluster& cluster_;
  const Segment& segment_;
  int turn_ = 0;
};

}  // namespace nibble::cuda
