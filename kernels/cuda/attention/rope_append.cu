// RoPE on q and k, and k and v of every row into their pages. The f32 operations, their order and their roundings are
// those of kernels/cpu/attention_inl.h, so q and the codes and parameters of the pages have the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/step_rows.cuh"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {
namespace {

struct RopeParameters {
  StepView step;
  void* qkv;
  const float* cos_sin;
  int max_positions;
  int q_heads, kv_heads, head_dim;
  int64_t row_elements, head_bytes;
  uint8_t* pages;
};

// Where a row's k and v go.
struct Destination {
  uint8_t* page;  // null: nothing to append to
  int token;
};
__device__ __forceinline__ Destination DestinationOf(const RopeParameters& p, int row, int position) {
  const int sequence = CheckedSequence(p.step, row);
  const int index = position / kTokensPerPage;
  const int page =
      CheckedPage(p.step, __ldg(p.step.page_tables + static_cast<int64_t>(sequence) * p.step.max_pages + index));
  return {p.pages + static_cast<int64_t>(page) * p.kv_heads * p.head_bytes, position % kTokensPerPage};
}
__device__ __forceinline__ int RopePosition(const RopeParameters& p, int row) {
  const int position = CheckedPosition(p.step, row);
  if (position >= p.max_positions) __trap();
  return position;
}

// Pairs (d, d + D/2). The 0 − x is the specification's: −x has another sign of zero.
__device__ __forceinline__ void RotatePair(float cosine, float sine, float* low, float* high) {
  const float l = *low, h = *high;
  *low = __fmaf_rn(l, cosine, __fsub_rn(0.0f, __fmul_rn(h, sine)));
  *high = __fmaf_rn(h, cosine, __fmul_rn(l, sine));
}

// f16 with saturation: a finite value stays finite.
__device__ __forceinline__ __half SaturatedF16(float x) {
  return __float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

// Scale and zero of one token's K or V from its largest and smallest value.
struct Quantizer {
  __half scale, zero;
  float scale_value, zero_value, inverse;
  bool quick;

  __device__ __forceinline__ Quantizer(float largest, float smallest) {
    const float minimum = -__fsub_rn(0.0f, smallest);  // the specification's sign of zero
    const float range = __fsub_rn(largest, minimum);
    scale = SaturatedF16(__fdiv_rn(range, 15.0f));
    zero = SaturatedF16(minimum);
    scale_value = __half2float(scale);
    zero_value = __half2float(zero);
    inverse = __frcp_rn(scale_value);
    quick = range < 1e6f;  // a scale that did not saturate: no quotient overflows
  }
  __device__ __forceinline__ uint32_t Code(float x) const {
    if (scale_value == 0.0f) return 0;
    const float code = rintf(__fdiv_rn(__fsub_rn(x, zero_value), scale_value));
    return static_cast<uint32_t>(fminf(15.0f, fmaxf(code, 0.0f)));
  }
  // Eight codes, the first lowest. A quotient is a product with the rounded reciprocal, corrected by one residual
  // (Markstein, IBM J. Res. Dev. 34, 1990). Adding 1.5 · 2^23 rounds to the nearest even integer and leaves it in the low
  // bits; what it leaves above them is subtracted from all eight at once.
  __device__ __forceinline__ uint32_t Codes(const float (&x)[8]) const {
    uint32_t codes = 0;
    if (scale_value == 0.0f) return codes;
    if (!quick) {
#pragma unroll
      for (int i = 0; i < 8; ++i) codes |= Code(x[i]) << (4 * i);
      return codes;
    }
    constexpr float kRound = 12582912.0f;
    constexpr uint32_t kRoundBits = 0x4b400000u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float difference = __fsub_rn(x[i], zero_value), product = __fmul_rn(difference, inverse);
      const float quotient = __fmaf_rn(__fmaf_rn(-product, scale_value, difference), inverse, product);
      codes += __float_as_uint(__fadd_rn(fminf(15.0f, fmaxf(quotient, 0.0f)), kRound)) << (4 * i);
    }
    return codes - kRoundBits * 0x11111111u;
  }
  __device__ __forceinline__ uint32_t Parameters() const {
    return static_cast<uint32_t>(__half_as_ushort(zero)) << 16 | __half_as_ushort(scale);
  }
};

__device__ __forceinline__ void UnpackBf16x8(const uint4& packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ uint4 PackBf16x8(const float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- bf16 rows, KV4, head sizes 64 and 128 ---------------------------------------------------------------------------

// A thread holds eight neighbouring channels of a head and the eight that they are rotated with, for several heads of
// one row that share its cosines and sines; D/16 neighbouring lanes hold a head.
constexpr int kHeadsPerThread = 4;

template <int kHeadDim>
__global__ void __maxnreg__(96) RopeAppendKernel(const __grid_constant__ RopeParameters p) {
  constexpr int kHeadThreads = kHeadDim / 16;
  GridDependencyLaunch();
  const int row = blockIdx.x, part = threadIdx.x % kHeadThreads;
  const int slot = threadIdx.x / kHeadThreads, slots = blockDim.x / kHeadThreads;
  const int heads = p.q_heads + 2 * p.kv_heads;
  const int position = RopePosition(p, row);
  __nv_bfloat16* qkv = static_cast<__nv_bfloat16*>(p.qkv) + row * p.row_elements + 8 * part;
  uint4 raw[kHeadsPerThread][2];
  const auto load = [&](int base) {
#pragma unroll
    for (int n = 0; n < kHeadsPerThread; ++n) {
      const int head = base + n * slots;
      if (head >= heads) continue;
      const uint4* from = reinterpret_cast<const uint4*>(qkv + head * kHeadDim);
      raw[n][0] = __ldcs(from);
      raw[n][1] = __ldcs(from + kHeadDim / 16);
    }
  };
  GridDependencyWait();
  load(slot);  // before the chain of loads that finds the page
  float cosine[8], sine[8];
  const float* table = p.cos_sin + static_cast<int64_t>(position) * kHeadDim + 8 * part;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(cosine + i) = __ldg(reinterpret_cast<const float4*>(table + i));
    *reinterpret_cast<float4*>(sine + i) = __ldg(reinterpret_cast<const float4*>(table + kHeadDim / 2 + i));
  }
  const Destination to = DestinationOf(p, row, position);

  for (int base = slot; base - slot < heads; base += kHeadsPerThread * slots) {
    if (base != slot) load(base);
#pragma unroll
    for (int n = 0; n < kHeadsPerThread; ++n) {
      const int head = base + n * slots;
      const bool exists = head < heads, is_query = head < p.q_heads, is_value = head >= p.q_heads + p.kv_heads;
      float low[8] = {}, high[8] = {};
      if (exists) {
        UnpackBf16x8(raw[n][0], low);
        UnpackBf16x8(raw[n][1], high);
        if (!is_value) {
#pragma unroll
          for (int i = 0; i < 8; ++i) RotatePair(cosine[i], sine[i], &low[i], &high[i]);
        }
        if (is_query) {
          uint4* out = reinterpret_cast<uint4*>(qkv + head * kHeadDim);
          out[0] = PackBf16x8(low);
          out[kHeadDim / 16] = PackBf16x8(high);
        }
      }
      if (!__any_sync(~0u, exists && !is_query)) continue;
      float largest = low[0], smallest = low[0];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        largest = fmaxf(largest, fmaxf(low[i], high[i]));
        smallest = fminf(smallest, fminf(low[i], high[i]));
      }
#pragma unroll
      for (int lanes = 1; lanes < kHeadThreads; lanes *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
        smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, lanes));
      }
      if (!exists || is_query) continue;
      const Quantizer quantizer(largest, smallest);
      const uint32_t codes[2] = {quantizer.Codes(low), quantizer.Codes(high)};
      uint8_t* bytes = to.page + (head - p.q_heads - (is_value ? p.kv_heads : 0)) * p.head_bytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = 8 * part + half * kHeadDim / 2;
        if (is_value) {
          *reinterpret_cast<uint16_t*>(bytes + VCodeWord(kHeadDim, to.token, d)) = static_cast<uint16_t>(codes[half]);
          *reinterpret_cast<uint16_t*>(bytes + VCodeWord(kHeadDim, to.token, d + 4)) =
              static_cast<uint16_t>(codes[half] >> 16);
        } else {
          *reinterpret_cast<uint32_t*>(bytes + KCodeByte(kHeadDim, to.token, d)) = codes[half];
        }
      }
      if (part == 0) {
        *reinterpret_cast<uint32_t*>(bytes + KvParameters(kHeadDim, to.token) + 4 * is_value) = quantizer.Parameters();
      }
    }
  }
}

// ---- everything else the operator page allows -----------------------------------------------------------------------

// A warp per (row, head); lane l holds pairs l, l + 32, ...
template <typename T>
__device__ __forceinline__ float Value(const T* from);
template <>
__device__ __forceinline__ float Value(const float* from) {
  return *from;
}
template <>
__device__ __forceinline__ float Value(const __nv_bfloat16* from) {
  return __bfloat162float(*from);
}
__device__ __forceinline__ void SetValue(float* to, float x) { *to = x; }
__device__ __forceinline__ void SetValue(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

template <typename T>
__global__ void RopeAppendAnyKernel(const __grid_constant__ RopeParameters p, bool kv4) {
  constexpr int kPairs = kMaxHeadDim / 2 / 32;
  GridDependencyLaunch();
  GridDependencyWait();
  const int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, half = p.head_dim / 2;
  const int position = RopePosition(p, row);
  const bool is_query = head < p.q_heads, is_value = head >= p.q_heads + p.kv_heads;
  T* x = static_cast<T*>(p.qkv) + row * p.row_elements + head * p.head_dim;
  const float* table = p.cos_sin + static_cast<int64_t>(position) * p.head_dim;
  float low[kPairs], high[kPairs], largest = -INFINITY, smallest = INFINITY;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = lane + 32 * k;
    low[k] = high[k] = 0;
    if (i >= half) continue;
    low[k] = Value<T>(x + i), high[k] = Value<T>(x + half + i);
    if (!is_value) RotatePair(table[i], table[half + i], &low[k], &high[k]);
    if (is_query) {
      SetValue(x + i, low[k]);
      SetValue(x + half + i, high[k]);
    }
    largest = fmaxf(largest, fmaxf(low[k], high[k]));
    smallest = fminf(smallest, fminf(low[k], high[k]));
  }
  if (is_query) return;
  const Destination to = DestinationOf(p, row, position);
  uint8_t* bytes = to.page + (head - p.q_heads - (is_value ? p.kv_heads : 0)) * p.head_bytes;
  if (!kv4) {
    float* floats = reinterpret_cast<float*>(bytes) + (is_value * kTokensPerPage + to.token) * p.head_dim;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = lane + 32 * k;
      if (i < half) floats[i] = low[k], floats[half + i] = high[k];
    }
    return;
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, lanes));
  }
  const Quantizer quantizer(largest, smallest);
  const auto store_pair = [&](int d, uint32_t code) {  // codes of channels d and d + 1 lie in neighbouring lanes
    const uint32_t next = __shfl_down_sync(~0u, code, 1);
    if (d % 2 != 0) return;
    const int at = is_value ? VCodeWord(p.head_dim, to.token, d / 4 * 4) + d % 4 / 2 : KCodeByte(p.head_dim, to.token, d);
    bytes[at] = static_cast<uint8_t>(code | next << 4);
  };
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = lane + 32 * k;
    const bool inside = i < half;
    store_pair(inside ? i : 1, inside ? quantizer.Code(low[k]) : 0);  // an odd channel stores nothing
    store_pair(inside ? half + i : 1, inside ? quantizer.Code(high[k]) : 0);
  }
  if (lane == 0) {
    *reinterpret_cast<uint32_t*>(bytes + KvParameters(p.head_dim, to.token) + 4 * is_value) = quantizer.Parameters();
  }
}

template <int kHeadDim>
void LaunchRopeAppend(const Device& device, const RopeParameters& parameters) {
  constexpr int kHeadThreads = kHeadDim / 16, kMaxThreads = 512;
  const int heads = parameters.q_heads + 2 * parameters.kv_heads;
  int threads = (heads + kHeadsPerThread - 1) / kHeadsPerThread * kHeadThreads;
  threads = (threads + 31) / 32 * 32;
  if (threads > kMaxThreads) threads = kMaxThreads;
  Launch(device, RopeAppendKernel<kHeadDim>, dim3(parameters.step.rows), dim3(threads), 0, parameters);
}

}  // namespace

void RopeAppend(const Device& device, const RopeAppendArgs& args) {
  const KvLayout& layout = args.pages.layout;
  const RopeParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .qkv = args.qkv.data,
      .cos_sin = args.cos_sin,
      .max_positions = static_cast<int>(args.max_positions),
      .q_heads = static_cast<int>(args.q_heads),
      .kv_heads = static_cast<int>(layout.kv_heads),
      .head_dim = static_cast<int>(layout.head_dim),
      .row_elements = args.qkv.cols,
      .head_bytes = layout.head_bytes(),
      .pages = args.pages.data,
  };
  const bool kv4 = layout.format == KvFormat::kKV4;
  if (args.qkv.dtype == DType::kBF16 && kv4 && layout.head_dim == 128) {
    LaunchRopeAppend<128>(device, parameters);
  } else if (args.qkv.dtype == DType::kBF16 && kv4 && layout.head_dim == 64) {
    LaunchRopeAppend<64>(device, parameters);
  } else {
    const dim3 grid(parameters.step.rows, parameters.q_heads + 2 * parameters.kv_heads);
    if (args.qkv.dtype == DType::kBF16) {
      Launch(device, RopeAppendAnyKernel<__nv_bfloat16>, grid, dim3(32), 0, parameters, kv4);
    } else {
      Launch(device, RopeAppendAnyKernel<float>, grid, dim3(32), 0, parameters, kv4);
    }
  }
}

}  // namespace nibble::cuda
