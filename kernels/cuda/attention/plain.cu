// A block per (row, query head): a thread per token of the page computes scores, a thread per channel sums values.
// Pages in order, one rescaling per page, as the CPU specification does; only the order inside a score and a sum of
// probabilities differs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/attention/plain.h"
#include "kernels/cuda/attention/step_rows.cuh"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChannels = (kMaxHeadDim + kThreads - 1) / kThreads;  // per thread

struct PlainParameters {
  StepView step;
  const uint8_t* pages;
  const void* qkv;
  void* out;
  DType in_type, out_type;
  int64_t in_columns, out_columns, head_bytes;
  int q_heads, kv_heads, head_dim;
  bool kv4;
  float scale;
};

__device__ __forceinline__ float Load(const void* from, DType type, int64_t i) {
  return type == DType::kF32 ? static_cast<const float*>(from)[i]
                             : __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
}
__device__ __forceinline__ void Store(void* to, DType type, int64_t i, float x) {
  if (type == DType::kF32) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
  }
}

// The largest, or the sum, over the block's threads; the same tree always.
template <typename Combine>
__device__ __forceinline__ float Reduce(float x, float* shared, Combine combine) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) x = combine(x, shared[i]);
  __syncthreads();
  return x;
}

__global__ void __launch_bounds__(kThreads, 1) PlainKernel(const __grid_constant__ PlainParameters p) {
  __shared__ float q[kMaxHeadDim], weights[kTokensPerPage], reduced[kThreads / 32];
  GridDependencyLaunch();
  GridDependencyWait();
  const int row = blockIdx.x, head = blockIdx.y, kv_head = head / (p.q_heads / p.kv_heads), d = p.head_dim;
  const int position = CheckedPosition(p.step, row), sequence = CheckedSequence(p.step, row);
  const auto sum_of = [](float a, float b) { return a + b; };
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  float part = 0;
  for (int i = threadIdx.x; i < d; i += kThreads) {
    q[i] = Load(p.qkv, p.in_type, row * p.in_columns + head * d + i) * p.scale;
    part += q[i];
  }
  const float q_sum = Reduce(part, reduced, sum_of);  // and q is complete
  float high = -INFINITY, sum = 0, zero_sum = 0, o[kChannels] = {};
  for (int first = 0; first <= position; first += kTokensPerPage) {
    const int page = CheckedPage(
        p.step, p.step.page_tables[static_cast<int64_t>(sequence) * p.step.max_pages + first / kTokensPerPage]);
    const uint8_t* bytes = p.pages + (static_cast<int64_t>(page) * p.kv_heads + kv_head) * p.head_bytes;
    const float* floats = reinterpret_cast<const float*>(bytes);
    const int token = threadIdx.x, count = min(position + 1 - first, kTokensPerPage);
    float score = -INFINITY, v_scale = 1, v_zero = 0;
    if (token < count) {
      float dot = 0;
      if (p.kv4) {
        for (int i = 0; i < d; i += 2) {
          const uint8_t codes = bytes[KCodeByte(d, token, i)];
          dot = fmaf(q[i], static_cast<float>(codes & 15), dot);
          dot = fmaf(q[i + 1], static_cast<float>(codes >> 4), dot);
        }
        const __half* parameters = reinterpret_cast<const __half*>(bytes + KvParameters(d, token));
        score = fmaf(__half2float(parameters[1]), q_sum, dot * __half2float(parameters[0]));
        v_scale = __half2float(parameters[2]);
        v_zero = __half2float(parameters[3]);
      } else {
        for (int i = 0; i < d; ++i) dot = fmaf(q[i], floats[token * d + i], dot);
        score = dot;
      }
    }
    const float new_high = fmaxf(high, Reduce(score, reduced, larger));
    const float base = new_high == -INFINITY ? 0.0f : new_high;
    const float rescale = expf(high - base);
    high = new_high;
    const float probability = token < count ? expf(score - base) : 0.0f;
    if (token < kTokensPerPage) weights[token] = probability * v_scale;
    sum = fmaf(sum, rescale, Reduce(probability, reduced, sum_of));  // and weights are complete
    zero_sum = fmaf(zero_sum, rescale, Reduce(probability * v_zero, reduced, sum_of));
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int i = threadIdx.x + c * kThreads;
      if (i >= d) continue;
      o[c] *= rescale;
      for (int j = 0; j < count; ++j) {
        const float value =
            p.kv4 ? static_cast<float>(bytes[VCodeWord(d, j, i / 4 * 4) + i % 4 / 2] >> (i % 2 * 4) & 15)
                  : floats[(kTokensPerPage + j) * d + i];
        o[c] = fmaf(weights[j], value, o[c]);
      }
    }
    __syncthreads();
  }
  const float inverse = 1.0f / sum;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int i = threadIdx.x + c * kThreads;
    if (i < d) Store(p.out, p.out_type, row * p.out_columns + head * d + i, (o[c] + zero_sum) * inverse);
  }
}

}  // namespace

void PlainAttention(const Device& device, const AttentionArgs& args) {
  const KvLayout& layout = args.pages.layout;
  const PlainParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .pages = args.pages.data,
      .qkv = args.qkv.data,
      .out = args.out.data,
      .in_type = args.qkv.dtype,
      .out_type = args.out.dtype,
      .in_columns = args.qkv.cols,
      .out_columns = args.out.cols,
      .head_bytes = layout.head_bytes(),
      .q_heads = static_cast<int>(args.q_heads),
      .kv_heads = static_cast<int>(layout.kv_heads),
      .head_dim = static_cast<int>(layout.head_dim),
      .kv4 = layout.format == KvFormat::kKV4,
      .scale = args.scale,
  };
  Launch(device, PlainKernel, dim3(parameters.step.rows, parameters.q_heads), dim3(kThreads), 0, parameters);
}

}  // namespace nibble::cuda
