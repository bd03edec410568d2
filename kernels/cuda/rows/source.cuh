// Where the rows to be coded come from. A source loads one octet at a time; what it loads may still have to be
// multiplied by a number of its row (the norm's), which is known when the whole row was seen.
//
// In registers (bf16 rows of whole blocks) an octet is fetched, then finished: all fetches of a thread are in flight
// before the first store.
#pragma once

#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

// Rows as they are.
struct PlainSource {
  static constexpr bool kNorm = false;
  struct Fetched {
    uint4 x;
  };

  Rows in;
  bool whole;

  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    LoadOctet(RowAt(in, row, 0, whole), begin, static_cast<int>(in.cols), x);
  }

  __device__ __forceinline__ Fetched Fetch(int64_t row, int begin) const {
    return {*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in.data) + row * in.cols + begin)};
  }
  __device__ __forceinline__ uint4 Finish(const Fetched& fetched, int64_t, int) const { return fetched.x; }
};

// residual += delta; a row is then residual · weight, times 1 / sqrt(mean(residual²) + eps).
struct NormSource {
  static constexpr bool kNorm = true;
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
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (begin + i < residual.cols) x[i] *= LowBF16(weight[begin + i]);
    }
  }

  __device__ __forceinline__ Fetched Fetch(int64_t row, int begin) const {
    const int64_t at = row * residual.cols + begin;
    Fetched fetched;
    fetched.residual = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(residual.data) + at);
    if (delta.data != nullptr) {
      fetched.delta = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(delta.data) + at);
    }
    return fetched;
  }
  __device__ __forceinline__ uint4 Finish(const Fetched& fetched, int64_t row, int begin) const {
    if (delta.data == nullptr) return fetched.residual;
    float x[kOctet], y[kOctet];
    Unpack(fetched.residual, x);
    Unpack(fetched.delta, y);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] += y[i];
    const uint4 sum = Pack(x);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(residual.data) + row * residual.cols + begin) = sum;
    return sum;
  }
};

// 1 / (1 + e^-x) with the bits of the specification's Sigmoid, for which Exp may be cut short: below 2^-126 it vanishes
// in 1 + Exp, so subnormal powers need not be right, and the sum is a normal number of at least 1. NaN gives a number.
__device__ __forceinline__ float ShortSigmoid(float x) {
  const float y = fminf(fmaxf(0.0f - x, -87.0f), 89.0f);
  const float shifted = y * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, left in the low bits
  const float n = shifted - 12582912.0f;
  float r = __fmaf_rn(n, -0.693359375f, y);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fmaf_rn(p, r * r, r) + 1.0f;
  const int bits = __float_as_int(p) + (__float_as_int(shifted) << 23);  // p · 2^n
  const float sum = 1.0f + __int_as_float(min(bits, 0x7f800000));        // at most infinity
  if (sum > 0x1p125f) return __frcp_rn(sum);
  // An approximation and one Newton step round a reciprocal correctly where nothing is subnormal, as __frcp_rn itself.
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(sum));
  return __fmaf_rn(reciprocal, __fmaf_rn(-sum, reciprocal, 1.0f), reciprocal);
}
__device__ __forceinline__ float SiluMul(float gate, float up) { return gate * ShortSigmoid(gate) * up; }

// silu(gate) · up of rows [gate, up], rounded to the rows' type.
struct SiluSource {
  static constexpr bool kNorm = false;
  struct Fetched {
    uint4 gate, up;
  };

  Rows gate_up;
  bool whole;

  __device__ __forceinline__ int Features() const { return static_cast<int>(gate_up.cols / 2); }
  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    float up[kOctet];
    LoadOctet(RowAt(gate_up, row, 0, whole), begin, Features(), x);
    LoadOctet(RowAt(gate_up, row, Features(), whole), begin, Features(), up);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = SiluMul(x[i], up[i]);
    if (gate_up.dtype == DType::kBF16) Unpack(Pack(x), x);
  }

  __device__ __forceinline__ Fetched Fetch(int64_t row, int begin) const {
    const uint16_t* gate = static_cast<const uint16_t*>(gate_up.data) + row * gate_up.cols + begin;
    return {*reinterpret_cast<const uint4*>(gate), *reinterpret_cast<const uint4*>(gate + Features())};
  }
  __device__ __forceinline__ uint4 Finish(const Fetched& fetched, int64_t, int) const {
    float x[kOctet], up[kOctet];
    Unpack(fetched.gate, x);
    Unpack(fetched.up, up);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = SiluMul(x[i], up[i]);
    return Pack(x);
  }
};

}  // namespace nibble::cuda
