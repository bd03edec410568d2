#include "kernels/cuda/dense/dense.h"

#include <cuda_bf16.h>

#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mma.h"
#include "kernels/cuda/ptx/shared.h"

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

// ---- mma -----------------------------------------------------------------------------------------------------------

// A block's tile of [T, N]. Outputs are the M of the instruction and rows its N, so that the weight is the operand
// that comes in fragment order, and a row alone costs one instruction of eight columns.
template <int kPlan>
struct DenseTile {
  static constexpr DensePlan kP = kDensePlans[kPlan];
  static constexpr int kStageBytes = kP.stage_bytes();
  static constexpr int kSteps16 = static_cast<int>(kDenseStepK) / 16;
  static constexpr int kRowBytes = static_cast<int>(kDenseStepK) * 2;
  static constexpr int kWeightBytes = kP.outputs * kRowBytes;         // of a stage; the rows follow
  static constexpr int kPanelStepBytes = static_cast<int>(kDensePanelN) * kRowBytes;
  static constexpr int kWarpRows = kP.rows < 64 ? kP.rows : 64;
  static constexpr int kWarpsRows = kP.rows / kWarpRows;
  static constexpr int kWarpOutputs = kP.outputs * kWarpsRows / (kP.threads / 32);
  static constexpr int kRowTiles = kWarpRows / 8, kOutputTiles = kWarpOutputs / 16;

  const DenseProblem& p;
  const uint32_t shared;
  const int64_t row, output;  // first of the block
  const int steps;            // over K

  __device__ void CopyWeight(int step, int stage) const {
    constexpr int kChunks = kWeightBytes / 16;
    static_assert(kChunks % kP.threads == 0);
    const int64_t panels = (p.n + kDensePanelN - 1) / kDensePanelN;
#pragma unroll
    for (int i = 0; i < kChunks / kP.threads; ++i) {
      const int at = (threadIdx.x + i * kP.threads) * 16;
      const int64_t panel = output / kDensePanelN + at / kPanelStepBytes;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.weight) +
                            (panel * steps + step) * kPanelStepBytes + at % kPanelStepBytes;
      CopyAsync16(shared + stage * kStageBytes + at, from, panel < panels);
    }
  }

  // Rows of 128 bytes; 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that eight rows of one chunk, which a
  // matrix load reads together, lie in different banks.
  __device__ void CopyRows(int step, int stage) const {
    constexpr int kChunks = kP.rows * kRowBytes / 16;
    for (int i = threadIdx.x; i < kChunks; i += kP.threads) {
      const int r = i / 8, chunk = i % 8;
      const uint16_t* from = static_cast<const uint16_t*>(p.in) + (row + r) * p.k + step * kDenseStepK + chunk * 8;
      CopyAsync16(shared + stage * kStageBytes + kWeightBytes + r * kRowBytes + (chunk ^ (r % 8)) * 16, from,
                  row + r < p.rows);
    }
  }

  __device__ uint32_t RowAddress(uint32_t rows, int r, int chunk) const {
    return rows + r * kRowBytes + (chunk ^ (r % 8)) * 16;
  }

  __device__ void Multiply(int stage, float (&sum)[kOutputTiles][kRowTiles][4]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t base = shared + stage * kStageBytes;
    const int first_tile = warp / kWarpsRows * kOutputTiles;  // tile of 16 outputs
    const uint32_t weight = base + first_tile / 4 * kPanelStepBytes + first_tile % 4 * 512 + lane * 16;
    const uint32_t rows = base + kWeightBytes + warp % kWarpsRows * kWarpRows * kRowBytes;
    uint32_t b[kSteps16][2];  // of eight rows only: two steps of 16 k to a load
    if constexpr (kRowTiles == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        LoadMatrices(RowAddress(rows, lane % 8, half * 4 + lane / 8), b[2 * half][0], b[2 * half][1],
                     b[2 * half + 1][0], b[2 * half + 1][1]);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps16; ++k) {
      uint4 a[kOutputTiles];
#pragma unroll
      for (int i = 0; i < kOutputTiles; ++i) a[i] = LoadShared128(weight + k * 2048 + i * 512);
#pragma unroll
      for (int j = 0; j < kRowTiles; j += 2) {
        uint32_t pair[4];
        if constexpr (kRowTiles > 1) {
          LoadMatrices(RowAddress(rows, j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2), pair[0], pair[1],
                       pair[2], pair[3]);
        } else {
          pair[0] = b[k][0];
          pair[1] = b[k][1];
        }
#pragma unroll
        for (int i = 0; i < kOutputTiles; ++i) {
          MmaBF16(sum[i][j], a[i].x, a[i].y, a[i].z, a[i].w, pair[0], pair[1]);
          if constexpr (kRowTiles > 1) MmaBF16(sum[i][j + 1], a[i].x, a[i].y, a[i].z, a[i].w, pair[2], pair[3]);
        }
      }
    }
  }

  __device__ void Write(const float (&sum)[kOutputTiles][kRowTiles][4]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t n0 = output + warp / kWarpsRows * kWarpOutputs + lane / 4;
    const int64_t row0 = row + warp % kWarpsRows * kWarpRows + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kOutputTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) Store(p, row0 + j * 8 + e % 2, n0 + i * 16 + e / 2 * 8, sum[i][j][e]);
      }
    }
  }

  __device__ void Run() const {
    constexpr int kAhead = kP.stages - 1;
    // The weight does not depend on the kernel before this one; the rows do.
    for (int step = 0; step < kAhead && step < steps; ++step) CopyWeight(step, step);
    GridDependencyWait();
    for (int step = 0; step < kAhead; ++step) {
      if (step < steps) CopyRows(step, step);
      CopyAsyncCommit();
    }
    float sum[kOutputTiles][kRowTiles][4] = {};
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      CopyAsyncWait<kAhead - 1>();
      __syncthreads();  // the copies of all threads; and all have left the stage that is filled next
      if (step + kAhead < steps) {
        const int next = stage == 0 ? kAhead : stage - 1;
        CopyWeight(step + kAhead, next);
        CopyRows(step + kAhead, next);
      }
      CopyAsyncCommit();
      Multiply(stage, sum);
      stage = stage == kP.stages - 1 ? 0 : stage + 1;
    }
    GridDependencyLaunch();
    Write(sum);
  }
};

template <int kPlan>
__global__ __launch_bounds__(kDensePlans[kPlan].threads, kPlan < 2 ? 3 : 2) void DenseMmaKernel(
    const __grid_constant__ DenseProblem p) {
  extern __shared__ uint4 stages[];
  constexpr DensePlan kP = kDensePlans[kPlan];
  const int64_t row_blocks = (p.rows + kP.rows - 1) / kP.rows;  // adjacent: they share the weight in the L2
  DenseTile<kPlan>{p, SharedAddress(stages), blockIdx.x % row_blocks * kP.rows, blockIdx.x / row_blocks * kP.outputs,
                   static_cast<int>(p.k / kDenseStepK)}
      .Run();
}

template <int kPlan>
void LaunchMma(const Device& device, const DenseProblem& p) {
  constexpr DensePlan kP = kDensePlans[kPlan];
  const int64_t blocks = (p.rows + kP.rows - 1) / kP.rows * ((p.n + kP.outputs - 1) / kP.outputs);
  NIBBLE_CUDA_CHECK(cudaFuncSetAttribute(DenseMmaKernel<kPlan>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         kP.shared_bytes()));
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
  const DensePlan plan = PlanDense(p.rows, p.k, in.dtype);
  static_assert(kNumDensePlans == 5);
  switch (plan.mma() ? plan.rows : 0) {
    case kDensePlans[0].rows: return LaunchMma<0>(device, p);
    case kDensePlans[1].rows: return LaunchMma<1>(device, p);
    case kDensePlans[2].rows: return LaunchMma<2>(device, p);
    case kDensePlans[3].rows: return LaunchMma<3>(device, p);
    case kDensePlans[4].rows: return LaunchMma<4>(device, p);
    default: break;
  }
  const int64_t blocks = (p.rows + plan.rows - 1) / plan.rows * ((p.n + plan.outputs - 1) / plan.outputs);
  Launch(device, DenseChainKernel, dim3(static_cast<unsigned>(blocks)), dim3(plan.threads), 0, p);
}

}  // namespace nibble::cuda
