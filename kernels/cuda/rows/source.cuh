// Where the rows to be coded come from. A source loads one octet at a time; what it loads may still have to be
// multiplied by a number of its row (the norm's), which is known when the whole row was seen.
//
// Packed rows (bf16, whole blocks) are fetched, then finished: a thread's fetches are in flight before its first store.
#pragma once

#include "kernels/cuda/math.cuh"
#include "kernels/cuda/rows/octet.cuh"

namespace nibble::cuda {

// Rows as they are.
struct PlainSource {
  static constexpr bool kNorm = false;
  static constexpr int kRegisters = 56;  // of packed rows: as few as need no spills
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
  static constexpr int kRegisters = 48;
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

// silu(gate) · up, before rounding: of any gate, for the rare octet that needs it.
inline __device__ __noinline__ float AnySiluMul(float gate, float up) { return gate * Sigmoid(gate) * up; }
// The same of two octets of bf16, rounded.
__device__ __forceinline__ uint4 SiluMul(const uint4& gate, const uint4& up) {
  const auto pair = [](uint32_t x) { return reinterpret_cast<const __nv_bfloat162&>(x); };
  const __nv_bfloat162 low = __hmin2(__hmin2(pair(gate.x), pair(gate.y)), __hmin2(pair(gate.z), pair(gate.w)));
  float x[kOctet], y[kOctet];
  Unpack(gate, x);
  Unpack(up, y);
  if (fminf(__low2float(low), __high2float(low)) < kShortSigmoidFrom) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = AnySiluMul(x[i], y[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = x[i] * ShortSigmoid(x[i]) * y[i];
  }
  return Pack(x);
}

// silu(gate) · up of rows [gate, up], rounded to the rows' type.
struct SiluSource {
  static constexpr bool kNorm = false;
  static constexpr int kRegisters = 56;  // of packed rows: as few as need no spills
  struct Fetched {
    uint4 gate, up;
  };

  Rows gate_up;
  bool whole;


  __device__ __forceinline__ int Features() const { return static_cast<int>(gate_up.cols / 2); }
  __device__ __forceinline__ void Load(int64_t row, int begin, float x[kOctet]) const {
    if (whole && gate_up.dtype == DType::kBF16 && begin < Features()) {
      return Unpack(Finish(Fetch(row, begin), row, begin), x);
    }
    float up[kOctet];
    LoadOctet(RowAt(gate_up, row, 0, whole), begin, Features(), x);
    LoadOctet(RowAt(gate_up, row, Features(), whole), begin, Features(), up);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = AnySiluMul(x[i], up[i]);
    if (gate_up.dtype == DType::kBF16) Unpack(Pack(x), x);
  }

  __device__ __forceinline__ Fetched Fetch(int64_t row, int begin) const {
    const uint16_t* gate = static_cast<const uint16_t*>(gate_up.data) + row * gate_up.cols + begin;
    return {*reinterpret_cast<const uint4*>(gate), *reinterpret_cast<const uint4*>(gate + Features())};
  }
  __device__ __forceinline__ uint4 Finish(const Fetched& fetched, int64_t, int) const {
    return SiluMul(fetched.gate, fetched.up);
  }
};

}  // namespace nibble::cuda
