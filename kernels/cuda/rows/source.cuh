// Where the rows to be coded come from. A source loads one octet at a time; what it loads may still have to be
// multiplied by a number of its row (the norm's), which is known when the whole row was seen.
//
// Slices (bf16, whole blocks; slice.cuh) fetch all of a thread's octets of a row first, then finish them into what they
// hold in registers until the row's scale is known: bf16, or f32 that the row's number multiplies.
#pragma once

#include "kernels/cuda/math.cuh"
#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

struct NoWeights {};

// Rows as they are.
struct PlainSource {
  static constexpr bool kNorm = false, kHadamard = false;
  using RowView = const uint16_t*;
  using Fetched = uint4;

  Rows in;
  bool whole;

  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    LoadOctet(RowAt(in, row, 0, whole), begin, static_cast<int>(in.cols), x);
  }

  __device__ __forceinline__ RowView View(int64_t row) const {
    return static_cast<const uint16_t*>(in.data) + row * in.cols;
  }
  __device__ __forceinline__ Fetched Fetch(const RowView& row, int begin) const {
    return __ldcs(reinterpret_cast<const uint4*>(row + begin));
  }
  template <int kOctets>
  __device__ __forceinline__ void Finish(const Fetched (&fetched)[kOctets], uint4* out) const {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) out[o] = fetched[o];
  }
};

// residual += delta; a row is then residual · weight, times 1 / sqrt(mean(residual²) + eps).
struct NormSource {
  static constexpr bool kNorm = true, kHadamard = false;
  struct RowView {
    uint16_t* residual;
    const uint16_t* delta;  // or null
  };
  struct Fetched {
    uint4 residual, delta;
  };

  Rows residual;
  Rows delta;  // null data: none
  const uint16_t* weight;
  const int32_t* row_index;  // null: row i is residual row i
  float eps;
  bool whole;

  // Row of the residual behind output row `row`.
  __device__ __forceinline__ int64_t Row(int64_t row) const {
    if (row_index == nullptr) return row;
    const int32_t from = row_index[row];
    if (from < 0 || from >= residual.rows) __trap();
    return from;
  }
  __device__ __forceinline__ float Multiplier(float sum_of_squares) const {
    const float mean = __fdiv_rn(sum_of_squares, static_cast<float>(residual.cols));
    return __frcp_rn(__fsqrt_rn(mean + eps));
  }
  // x: the residual, after the addition.
  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    const int end = static_cast<int>(residual.cols);
    const RowSpan span = RowAt(residual, row, 0, whole);
    LoadOctet(span, begin, end, x);
    if (delta.data == nullptr) return;
    float y[kOctet];
    LoadOctet(RowAt(delta, row, 0, whole), begin, end, y);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] += y[i];
    StoreOctet(span, begin, end, x);
  }
  __device__ __forceinline__ void Weigh(int begin, float x[kOctet]) const {
    if (whole) {
      float w[kOctet];
      if (begin >= residual.cols) return;
      Unpack(*reinterpret_cast<const uint4*>(weight + begin), w);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] *= w[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (begin + i < residual.cols) x[i] *= LowBF16(weight[begin + i]);
    }
  }

  __device__ __forceinline__ RowView View(int64_t row) const {
    const int64_t at = Row(row) * residual.cols;
    return {static_cast<uint16_t*>(residual.data) + at,
            delta.data == nullptr ? nullptr : static_cast<const uint16_t*>(delta.data) + at};
  }
  __device__ __forceinline__ uint4 FetchWeights(int begin) const {
    return __ldg(reinterpret_cast<const uint4*>(weight + begin));
  }
  __device__ __forceinline__ Fetched Fetch(const RowView& row, int begin) const {
    Fetched fetched;
    fetched.residual = __ldcs(reinterpret_cast<const uint4*>(row.residual + begin));
    if (row.delta != nullptr) fetched.delta = __ldcs(reinterpret_cast<const uint4*>(row.delta + begin));
    return fetched;
  }
  // Stores the sum, weighs it, and returns the octet's part of its squares.
  __device__ __forceinline__ float Finish(const Fetched& fetched, const uint4& weights, const RowView& row, int begin,
                                          float (&x)[kOctet]) const {
    Unpack(fetched.residual, x);
    if (row.delta != nullptr) {
      float y[kOctet];
      Unpack(fetched.delta, y);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] += y[i];
      const uint4 sum = Pack(x);
      Unpack(sum, x);
      *reinterpret_cast<uint4*>(row.residual + begin) = sum;
    }
    const float squares = SquareChain(x);
    float w[kOctet];
    Unpack(weights, w);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] *= w[i];
    return squares;
  }
};

// silu(gate) · up as the specification computes it, before rounding.
inline __device__ __noinline__ float ExactSiluMul(float gate, float up) { return gate * Sigmoid(gate) * up; }

// The same of octets of bf16, rounded. The special function unit's e^x and 1/x come so near to the specification's
// product that, for gates of at least kQuickGate, both round to the same bf16 unless the product is within kQuickDoubt
// f32 units of the middle between two bf16. There, and below kQuickGate, it is computed as specified.
inline constexpr float kQuickGate = -8.0f;
inline constexpr uint32_t kQuickDoubt = 10;
template <int kOctets>
__device__ __forceinline__ void SiluMul(const uint4 (&gate)[kOctets], const uint4 (&up)[kOctets],
                                        uint4 (&out)[kOctets]) {
  const auto pair = [](uint32_t x) { return reinterpret_cast<const __nv_bfloat162&>(x); };
  float product[kOctets][kOctet];
  uint32_t nearest = ~0u;  // two numbers of 16 bits: steps from the first doubtful value, modulo 2^16
  __nv_bfloat162 lowest = pair(gate[0].x);
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    float x[kOctet], y[kOctet];
    Unpack(gate[o], x);
    Unpack(up[o], y);
    lowest = __hmin2(__hmin2(lowest, pair(gate[o].x)), pair(gate[o].y));
    lowest = __hmin2(__hmin2(lowest, pair(gate[o].z)), pair(gate[o].w));
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      float e, sigmoid;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x[i] * -1.44269504088896341f));
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + e));
      product[o][i] = x[i] * sigmoid * y[i];
      if (i % 2 != 0) {
        constexpr uint32_t kFromDoubt = (0x8000 + kQuickDoubt) * 0x00010001u;
        const uint32_t dropped =
            __byte_perm(__float_as_uint(product[o][i - 1]), __float_as_uint(product[o][i]), 0x5410);
        nearest = __viaddmin_u16x2(dropped, kFromDoubt, nearest);
      }
    }
  }
  const __nv_bfloat162 quick_gate = __float2bfloat162_rn(kQuickGate);
  if (min(nearest & 0xffff, nearest >> 16) <= 2 * kQuickDoubt || !__hbge2(lowest, quick_gate)) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float x[kOctet], y[kOctet];
      Unpack(gate[o], x);
      Unpack(up[o], y);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const uint32_t steps = (__float_as_uint(product[o][i]) + 0x8000 + kQuickDoubt) & 0xffff;
        if (steps <= 2 * kQuickDoubt || x[i] < kQuickGate) product[o][i] = ExactSiluMul(x[i], y[i]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOctets; ++o) out[o] = Pack(product[o]);
}

// silu(gate) · up of rows [gate, up], rounded to the rows' type.
struct SiluSource {
  static constexpr bool kNorm = false, kHadamard = false;
  using RowView = const uint16_t*;
  struct Fetched {
    uint4 gate, up;
  };

  Rows gate_up;
  bool whole;

  __device__ __forceinline__ int Features() const { return static_cast<int>(gate_up.cols / 2); }
  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    if (whole && gate_up.dtype == DType::kBF16 && begin < Features()) {
      const Fetched fetched[] = {Fetch(View(row), begin)};
      uint4 out[1];
      Finish(fetched, out);
      return Unpack(out[0], x);
    }
    float up[kOctet];
    LoadOctet(RowAt(gate_up, row, 0, whole), begin, Features(), x);
    LoadOctet(RowAt(gate_up, row, Features(), whole), begin, Features(), up);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = ExactSiluMul(x[i], up[i]);
    if (gate_up.dtype == DType::kBF16) Unpack(Pack(x), x);
  }

  __device__ __forceinline__ RowView View(int64_t row) const {
    return static_cast<const uint16_t*>(gate_up.data) + row * gate_up.cols;
  }
  __device__ __forceinline__ Fetched Fetch(const RowView& row, int begin) const {
    return {__ldcs(reinterpret_cast<const uint4*>(row + begin)),
            __ldcs(reinterpret_cast<const uint4*>(row + Features() + begin))};
  }
  template <int kOctets>
  __device__ __forceinline__ void Finish(const Fetched (&fetched)[kOctets], uint4* out) const {
    uint4 gate[kOctets], up[kOctets], product[kOctets];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) gate[o] = fetched[o].gate, up[o] = fetched[o].up;
    SiluMul(gate, up, product);
#pragma unroll
    for (int o = 0; o < kOctets; ++o) out[o] = product[o];
  }
};

// Rows of `Base` through an orthonormal block-Hadamard transform of at most kMostWarpHadamard channels.
template <typename Base>
struct WithHadamard : Base {
  static constexpr bool kHadamard = true;

  int hadamard;
};

}  // namespace nibble::cuda
