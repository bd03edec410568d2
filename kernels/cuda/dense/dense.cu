#include "kernels/cuda/dense/dense.h"

#include <cuda_bf16.h>

#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mma.h"
#include "kernels/cuda/ptx/shared.h"
#include "kernels/cuda/ptx/wgmma_bf16.h"

namespace nibble::cuda {
namespace {

struct DenseProblem {
  const uint16_t* weight;  // DenseWeight::data
  const void* in;          // [T, K]
  const float* bias;       // [N] or null
  void* out;               // [T, N]
  bool in_f32, out_f32;
  int64_t rows, n, k;
};

__device__ __forceinline__ float FromBF16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__device__ __forceinline__ void Store(const DenseProblem& p, int64_t row, int64_t n, float y) {
  if (row >= p.rows || n >= p.n) return;
  if (p.bias != nullptr) y = y + p.bias[n];
  if (p.out_f32) {
    static_cast<float*>(p.out)[row * p.n + n] = y;
  } else {
    static_cast<uint16_t*>(p.out)[row * p.n + n] = __bfloat16_as_ushort(__float2bfloat16_rn(y));
  }
}

// ---- matrix units --------------------------------------------------------------------------------------------------

// A block's tile of [T, N]. Outputs are the M of the instruction and rows its N, so that the weight is the operand that
// comes in fragment order, from shared memory by way of registers, and few rows cost little. A warpgroup computes a
// panel of 64 outputs, a warp of it 16.
template <int kPlan>
struct DenseTile {
  static constexpr DensePlan kP = kDensePlans[kPlan];
  static constexpr int kStageBytes = kP.stage_bytes();
  static constexpr int kSteps16 = static_cast<int>(kDenseStepK) / 16;
  static constexpr int kRowBytes = static_cast<int>(kDenseStepK) * 2;
  static constexpr int kWeightBytes = kP.outputs * kRowBytes;  // of a stage; the rows follow
  static constexpr int kPanelStepBytes = static_cast<int>(kDensePanelN) * kRowBytes;
  static_assert(kP.threads * kDensePanelN == kP.outputs * 128);
  // A stage is filled again two steps after its use: products of one step may still be running then.
  static constexpr int kAhead = kP.stages - 2;

  const DenseProblem& p;
  const uint32_t shared;
  const int64_t row, output;  // first of the block
  const int steps;            // over K

  __device__ void CopyWeight(int step) const {
    constexpr int kChunks = kWeightBytes / 16;
    static_assert(kChunks % kP.threads == 0);
    const int64_t panels = (p.n + kDensePanelN - 1) / kDensePanelN;
#pragma unroll
    for (int i = 0; i < kChunks / kP.threads; ++i) {
      const int at = (threadIdx.x + i * kP.threads) * 16;
      const int64_t panel = output / kDensePanelN + at / kPanelStepBytes;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.weight) +
                            (panel * steps + step) * kPanelStepBytes + at % kPanelStepBytes;
      CopyAsync16(Stage(step) + at, from, panel < panels);
    }
  }

  // Rows of 128 bytes; 16-byte chunk c of row r lies at chunk c ^ (r % 8): the 128-byte swizzle of wgmma's operand B,
  // and for matrix loads eight rows of one chunk in different banks.
  __device__ void CopyRows(int step) const {
    constexpr int kChunks = kP.rows * kRowBytes / 16;
    for (int i = threadIdx.x; i < kChunks; i += kP.threads) {
      const int r = i / 8, chunk = i % 8;
      const uint16_t* from = static_cast<const uint16_t*>(p.in) + (row + r) * p.k + step * kDenseStepK + chunk * 8;
      CopyAsync16(RowAddress(step, r, chunk), from, row + r < p.rows);
    }
  }

  __device__ uint32_t Stage(int step) const { return shared + step % kP.stages * kStageBytes; }
  __device__ uint32_t RowAddress(int step, int r, int chunk) const {
    return Stage(step) + kWeightBytes + r * kRowBytes + (chunk ^ (r % 8)) * 16;
  }

  // This lane's fragments of a step's weight.
  __device__ void LoadWeight(int step, uint32_t (&a)[kSteps16][4]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t from = Stage(step) + warp / 4 * kPanelStepBytes + warp % 4 * 512 + lane * 16;
#pragma unroll
    for (int k = 0; k < kSteps16; ++k) {
      const uint4 fragment = LoadShared128(from + k * 2048);
      a[k][0] = fragment.x;
      a[k][1] = fragment.y;
      a[k][2] = fragment.z;
      a[k][3] = fragment.w;
    }
  }

  // sum[4j + i]: output lane / 4 + 8 (i / 2) of the warp's sixteen, row 8j + 2 (lane % 4) + i % 2. On wgmma the products
  // of this call may still run when it returns, those of the call before do not.
  __device__ void Multiply(int step, const uint32_t (&a)[kSteps16][4], float (&sum)[kP.rows / 2]) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint32_t rows = WgmmaDescriptor(Stage(step) + kWeightBytes);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kSteps16; ++k) WgmmaBF16<kP.rows>::Run(sum, a[k], rows + 2 * k);
    WgmmaCommit();
    WgmmaWait<1>();
#else
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kP.rows / 8; ++j) {
      uint32_t b[kSteps16][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        LoadMatrices(RowAddress(step, j * 8 + lane % 8, half * 4 + lane / 8), b[2 * half][0], b[2 * half][1],
                     b[2 * half + 1][0], b[2 * half + 1][1]);
      }
      float(&tile)[4] = reinterpret_cast<float(&)[4]>(sum[4 * j]);
#pragma unroll
      for (int k = 0; k < kSteps16; ++k) MmaBF16(tile, a[k][0], a[k][1], a[k][2], a[k][3], b[k][0], b[k][1]);
    }
#endif
  }

  // Returns when no product is running.
  __device__ void Finish() const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    WgmmaWait<0>();
#endif
  }

  __device__ void Write(const float (&sum)[kP.rows / 2]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t n0 = output + warp * 16 + lane / 4, row0 = row + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kP.rows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) Store(p, row0 + j * 8 + i % 2, n0 + i / 2 * 8, sum[4 * j + i]);
    }
  }

  // Waits for a step's stage and starts filling the one that became free.
  __device__ void Advance(int step) const {
    CopyAsyncWait<kAhead - 1>();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    FenceProxyAsync();
#endif
    __syncthreads();  // the copies of all threads; and all have left the stage that is filled next
    if (step + kAhead < steps) {
      CopyWeight(step + kAhead);
      CopyRows(step + kAhead);
    }
    CopyAsyncCommit();
  }

  __device__ void Run() const {
    // The weight does not depend on the kernel before this one; the rows do.
    for (int step = 0; step < kAhead && step < steps; ++step) CopyWeight(step);
    GridDependencyWait();
    for (int step = 0; step < kAhead; ++step) {
      if (step < steps) CopyRows(step);
      CopyAsyncCommit();
    }
    float sum[kP.rows / 2] = {};
    // Fragments of even and odd steps in registers of their own: one is loaded while the other's products run.
    uint32_t even[kSteps16][4], odd[kSteps16][4];
    int step = 0;
    for (; step + 1 < steps; step += 2) {
      Advance(step);
      LoadWeight(step, even);
      Multiply(step, even, sum);
      Advance(step + 1);
      LoadWeight(step + 1, odd);
      Multiply(step + 1, odd, sum);
    }
    Finish();
    if (step < steps) {
      Advance(step);
      LoadWeight(step, even);
      Multiply(step, even, sum);
      Finish();
    }
    GridDependencyLaunch();
    Write(sum);
  }
};

template <int kPlan>
__global__ __launch_bounds__(kDensePlans[kPlan].threads, kDensePlans[kPlan].blocks) void DenseMmaKernel(
    const __grid_constant__ DenseProblem p) {
  constexpr DensePlan kP = kDensePlans[kPlan];
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kPlan < kDensePlansBeforeHopper)  // the others are never picked there, and have no code
#endif
  {
    extern __shared__ __align__(1024) uint8_t stages[];
    const int64_t row_blocks = (p.rows + kP.rows - 1) / kP.rows;  // adjacent: they share the weight in the L2
    DenseTile<kPlan>{p, SharedAddress(stages), blockIdx.x % row_blocks * kP.rows, blockIdx.x / row_blocks * kP.outputs,
                     static_cast<int>(p.k / kDenseStepK)}
        .Run();
  }
}

template <int kPlan>
void LaunchMma(const Device& device, const DenseProblem& p) {
  constexpr DensePlan kP = kDensePlans[kPlan];
  const int64_t blocks = (p.rows + kP.rows - 1) / kP.rows * ((p.n + kP.outputs - 1) / kP.outputs);
  AllowSharedMemory(DenseMmaKernel<kPlan>, kP.shared_bytes());
  Launch(device, DenseMmaKernel<kPlan>, dim3(static_cast<unsigned>(blocks)), dim3(kP.threads), kP.shared_bytes(), p);
}

// ---- chain ---------------------------------------------------------------------------------------------------------

// Where output n of a panel at input feature k lies in it, in elements.
__device__ __forceinline__ int64_t DenseOffset(int64_t n, int64_t k) {
  const int64_t tile = k / 16 * 4 + n / 16, lane = n % 8 * 4 + k % 8 / 2;
  return (tile * 32 + lane) * 8 + k % 16 / 8 * 4 + n % 16 / 8 * 2 + k % 2;
}

// 32 rows × 32 outputs by 16 × 16 threads, each with two of either, 32 k at a time in shared memory.
__global__ __launch_bounds__(kDenseChainPlan.threads) void DenseChainKernel(const __grid_constant__ DenseProblem p) {
  constexpr int kTile = 32;
  static_assert(kDenseChainPlan.rows == kTile && kDenseChainPlan.outputs == kTile);
  __shared__ float x[kTile][kTile + 1], w[kTile][kTile + 1];
  GridDependencyWait();
  const int64_t row_blocks = (p.rows + kTile - 1) / kTile, k_tiles = (p.k + 15) / 16;
  const int64_t row = blockIdx.x % row_blocks * kTile, output = blockIdx.x / row_blocks * kTile;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sum[2][2] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kTile) {
    for (int i = threadIdx.x; i < kTile * kTile; i += kDenseChainPlan.threads) {
      const int64_t r = row + i / kTile, n = output + i / kTile, k = k0 + i % kTile, at = r * p.k + k;
      const bool has_x = r < p.rows && k < p.k, has_w = n < p.n && k < p.k;
      x[i / kTile][i % kTile] = !has_x     ? 0.0f
                                : p.in_f32 ? static_cast<const float*>(p.in)[at]
                                           : FromBF16(static_cast<const uint16_t*>(p.in)[at]);
      const int64_t panel = n / kDensePanelN * k_tiles * 16 * kDensePanelN;
      w[i / kTile][i % kTile] = has_w ? FromBF16(p.weight[panel + DenseOffset(n % kDensePanelN, k)]) : 0.0f;
    }
    __syncthreads();
    const int count = p.k - k0 < kTile ? static_cast<int>(p.k - k0) : kTile;
    for (int k = 0; k < count; ++k) {
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) sum[i][j] = __fmaf_rn(x[ty + 16 * i][k], w[tx + 16 * j][k], sum[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) Store(p, row + ty + 16 * i, output + tx + 16 * j, sum[i][j]);
  }
}

}  // namespace

void LinearDense(const Device& device, const LinearArgs& args) {
  const auto* weight = dynamic_cast<const DenseWeight*>(args.weight);
  NIBBLE_CHECK(weight != nullptr, "a dense input needs a weight from PackDense");
  const Rows& in = args.input.dense;
  const DenseProblem p = {.weight = weight->data.as<uint16_t>(),
                          .in = in.data,
                          .bias = args.bias,
                          .out = args.out.data,
                          .in_f32 = in.dtype == DType::kF32,
                          .out_f32 = args.out.dtype == DType::kF32,
                          .rows = args.input.rows,
                          .n = weight->n,
                          .k = weight->k};
  const DensePlan plan = PlanDense(p.rows, p.k, in.dtype, device.shared_bytes);
  static_assert(kNumDensePlans == 6);
  switch (plan.mma() ? plan.rows : 0) {
    case kDensePlans[0].rows: return LaunchMma<0>(device, p);
    case kDensePlans[1].rows: return LaunchMma<1>(device, p);
    case kDensePlans[2].rows: return LaunchMma<2>(device, p);
    case kDensePlans[3].rows: return LaunchMma<3>(device, p);
    case kDensePlans[4].rows: return LaunchMma<4>(device, p);
    case kDensePlans[5].rows: return LaunchMma<5>(device, p);
    default: break;
  }
  const int64_t blocks = (p.rows + plan.rows - 1) / plan.rows * ((p.n + plan.outputs - 1) / plan.outputs);
  Launch(device, DenseChainKernel, dim3(static_cast<unsigned>(blocks)), dim3(plan.threads), 0, p);
}

}  // namespace nibble::cuda
