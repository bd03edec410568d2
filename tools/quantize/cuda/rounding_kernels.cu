#include "tools/quantize/cuda/launch.cuh"
#include "tools/quantize/cuda/rounding_kernels.h"

namespace nibble::cuda {
namespace {

constexpr int kGroup = 128, kLane = 4;  // columns of a group, and of a lane
constexpr int kSweepThreads = 512;
constexpr float kMaxLevel = 119;

__device__ __forceinline__ float Clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
__device__ __forceinline__ float Code(float level, float min, float inverse_scale) {
  return Clamp(rintf((level - min) * inverse_scale), 0.0f, 15.0f);
}
template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

__global__ void RowMaxKernel(const float* weight, int64_t n, int64_t k, float* largest) {
  const int64_t row = Item() / 32;
  if (row >= n) return;
  float max = 0;
  for (int64_t j = threadIdx.x % 32; j < k; j += 32) max = fmaxf(max, fabsf(weight[row * k + j]));
  max = WarpMax(max);
  if (threadIdx.x % 32 == 0) largest[row] = max > 1e-30f ? max : 0.0f;
}

__global__ void RowStepKernel(const float* largest, float clip, int64_t n, float* step) {
  const int64_t row = Item();
  if (row < n) step[row] = largest[row] > 0 ? largest[row] * (clip / kMaxLevel) : 1.0f;
}

__global__ void SearchGroupKernel(RoundArgs args, const int32_t* places, int64_t group, int steps, int shifts) {
  const int64_t row = Item() / 32;
  if (row >= args.n) return;
  const int lane = threadIdx.x % 32;
  const float inverse_step = 1 / args.step[row];
  float level[kLane], weight[kLane], high = -kMaxLevel, low = kMaxLevel;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const int32_t place = places[lane * kLane + i];
    level[i] = Clamp(args.target[row * args.k + place] * inverse_step, -1024, 1024);
    weight[i] = args.column_weight[place];
    const float clipped = Clamp(rintf(level[i]), -kMaxLevel, kMaxLevel);
    high = fmaxf(high, clipped);
    low = fminf(low, clipped);
  }
  high = WarpMax(high);
  low = -WarpMax(-low);
  const float nearest = fmaxf(1.0f, rintf((high - low) / 15));
  float best_scale = 1, best_min = 0, best_error = 0;
  for (int step = 0; step < steps; ++step) {
    const float s = fmaxf(1.0f, nearest - static_cast<float>(step)), inverse = 1 / s;
    for (int shift = 0; shift < shifts; ++shift) {
      float m = rintf(low + ((high - low) - 15 * s) * (0.25f * static_cast<float>(shift)));
      m = fminf(Clamp(m, -kMaxLevel, kMaxLevel), 127 - 15 * s);
      float error = 0;
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const float difference = Code(level[i], m, inverse) * s + m - level[i];
        error += difference * difference * weight[i];
      }
      error = WarpSum(error);
      if ((step == 0 && shift == 0) || error < best_error) best_scale = s, best_min = m, best_error = error;
    }
  }
  if (lane == 0) {
    args.group_scale[row * (args.k / kGroup) + group] = best_scale;
    args.group_min[row * (args.k / kGroup) + group] = best_min;
  }
}

// What a lane knows of its four columns.
struct Columns {
  float weight[kLane], column_weight[kLane], scale[kLane], inverse[kLane], min[kLane], error[kLane];
  uint8_t code[kLane];
};

__device__ __forceinline__ Columns LoadColumns(const RoundArgs& args, int64_t row, int64_t first) {
  Columns c;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const int64_t group = row * (args.k / kGroup) + args.group_of[first + i];
    c.weight[i] = args.weight[row * args.k + first + i];
    c.column_weight[i] = args.column_weight[first + i];
    c.scale[i] = args.group_scale[group];
    c.inverse[i] = 1 / c.scale[i];
    c.min[i] = args.group_min[group];
    c.error[i] = args.error[row * args.k + first + i];
  }
  return c;
}

__device__ __forceinline__ void StoreColumns(const RoundArgs& args, int64_t row, int64_t first, const Columns& c) {
  *reinterpret_cast<float4*>(args.error + row * args.k + first) =
      make_float4(c.error[0], c.error[1], c.error[2], c.error[3]);
  *reinterpret_cast<uchar4*>(args.codes + row * args.k + first) =
      make_uchar4(c.code[0], c.code[1], c.code[2], c.code[3]);
}

// block [128][128] = matrix [K, K] at (begin, begin), or zeros.
__device__ void LoadBlock(const float* matrix, int64_t k, int64_t begin, float* block) {
  for (int i = threadIdx.x; i < kGroup * kGroup; i += blockDim.x) {
    block[i] = matrix == nullptr ? 0.0f : matrix[(begin + i / kGroup) * k + begin + i % kGroup];
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kSweepThreads)
    SweepKernel(RoundArgs args, const float* feedback, int64_t begin, float* loss) {
  extern __shared__ float block[];
  LoadBlock(feedback, args.k, begin, block);
  const int64_t row = Item() / 32;
  if (row >= args.n) return;
  const int lane = threadIdx.x % 32;
  const int64_t first = begin + lane * kLane;
  Columns c = LoadColumns(args, row, first);
  const float step = args.step[row], inverse_step = 1 / step;
  float target[kLane], lost = 0;
#pragma unroll
  for (int i = 0; i < kLane; ++i) target[i] = args.target[row * args.k + first + i];
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      // Every lane rounds its i-th column as it stands; only the owner's is final, and only that one is spread.
      const float level = Clamp(target[i] * inverse_step, -1024, 1024);
      const float code = Code(level, c.min[i], c.inverse[i]), value = (code * c.scale[i] + c.min[i]) * step;
      if (lane == owner) {
        c.code[i] = static_cast<uint8_t>(code);
        c.error[i] = c.weight[i] - value;
        lost += (target[i] - value) * (target[i] - value) * c.column_weight[i];
      }
      const float error = __shfl_sync(~0u, c.weight[i] - value, owner);
      const float4 u = *reinterpret_cast<const float4*>(block + (owner * kLane + i) * kGroup + lane * kLane);
      target[0] += error * u.x;  // zero at and before the column itself
      target[1] += error * u.y;
      target[2] += error * u.z;
      target[3] += error * u.w;
    }
  }
  StoreColumns(args, row, first, c);
  lost = WarpSum(lost);
  if (lane == 0) loss[row] += lost;
}

__global__ void TakeBetterKernel(RoundArgs args, const float* loss, bool first, RoundArgs best, float* best_step,
                                 float* best_loss) {
  const int64_t row = blockIdx.x, groups = args.k / kGroup;
  const bool better = first || loss[row] < best_loss[row];
  __syncthreads();  // best_loss is read by all threads before one of them writes it
  if (!better) return;
  for (int64_t j = threadIdx.x; j < args.k; j += blockDim.x) {
    best.codes[row * args.k + j] = args.codes[row * args.k + j];
    best.error[row * args.k + j] = args.error[row * args.k + j];
  }
  for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
    best.group_scale[row * groups + g] = args.group_scale[row * groups + g];
    best.group_min[row * groups + g] = args.group_min[row * groups + g];
  }
  if (threadIdx.x == 0) {
    best_step[row] = args.step[row];
    best_loss[row] = loss[row];
  }
}

__global__ void __launch_bounds__(kSweepThreads)
    RefineKernel(RoundArgs args, const float* hessian, const float* residual, int64_t begin) {
  extern __shared__ float block[];
  LoadBlock(hessian, args.k, begin, block);
  const int64_t row = Item() / 32;
  if (row >= args.n) return;
  const int lane = threadIdx.x % 32;
  const int64_t first = begin + lane * kLane;
  Columns c = LoadColumns(args, row, first);
  const float step = args.step[row];
  float r[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) r[i] = residual[row * kGroup + lane * kLane + i];
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int column = owner * kLane + i;
      const float value = c.weight[i] - c.error[i];
      const float level = Clamp((value + r[i] / block[column * kGroup + column]) / step, -1024, 1024);
      const float code = Code(level, c.min[i], c.inverse[i]), moved = (code * c.scale[i] + c.min[i]) * step;
      if (lane == owner) {
        c.code[i] = static_cast<uint8_t>(code);
        c.error[i] = c.weight[i] - moved;
      }
      const float change = __shfl_sync(~0u, moved - value, owner);
      const float4 h = *reinterpret_cast<const float4*>(block + column * kGroup + lane * kLane);
      r[0] -= change * h.x;
      r[1] -= change * h.y;
      r[2] -= change * h.z;
      r[3] -= change * h.w;
    }
  }
  StoreColumns(args, row, first, c);
}

__global__ void ErrorToValueKernel(RoundArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  for (int64_t j = threadIdx.x; j < args.k; j += blockDim.x)
    args.error[row + j] = args.weight[row + j] - args.error[row + j];
}

__global__ void RefitRowsKernel(RoundArgs args, const float* product, float* step) {
  const int64_t row = Item() / 32;
  if (row >= args.n) return;
  float energy = 0, along = 0;
  for (int64_t j = row * args.k + threadIdx.x % 32; j < (row + 1) * args.k; j += 32) {
    energy += product[j] * args.error[j];
    along += product[j] * (args.weight[j] - args.error[j]);
  }
  energy = WarpSum(energy);
  along = WarpSum(along);
  const float factor = energy > 0 ? Clamp(1 + along / energy, 0.5f, 2.0f) : 1.0f;
  for (int64_t j = row * args.k + threadIdx.x % 32; j < (row + 1) * args.k; j += 32) {
    args.error[j] = args.weight[j] - args.error[j] * factor;
  }
  if (threadIdx.x % 32 == 0) step[row] *= factor;
}

__global__ void EnergyKernel(const float* v, const float* product, double ridge, int64_t n, int64_t k, double* energy) {
  const int64_t row = Item() / 32;
  if (row >= n) return;
  double sum = 0;
  for (int64_t j = row * k + threadIdx.x % 32; j < (row + 1) * k; j += 32) {
    const double x = v[j];
    sum += x * (product[j] - ridge * x);
  }
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) energy[row] = sum;
}

__global__ void ZeroRowsKernel(const float* largest, int64_t k, float* step, float* error) {
  const int64_t row = blockIdx.x;
  if (largest[row] > 0) return;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) error[row * k + j] = 0;
  if (threadIdx.x == 0) step[row] = 0;
}

__global__ void PackKernel(PackArgs args) {
  const int64_t row = blockIdx.x, groups = args.k / kGroup;
  const uint8_t* codes = args.codes + row * args.k;
  for (int64_t b = threadIdx.x; b < args.k / 2; b += blockDim.x) {
    args.packed[row * args.k / 2 + b] =
        static_cast<uint8_t>(codes[args.place_of[2 * b]] | codes[args.place_of[2 * b + 1]] << 4);
  }
  for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
    args.packed_scale[row * groups + g] = static_cast<uint8_t>(args.group_scale[row * groups + g]);
    args.packed_min[row * groups + g] = static_cast<int8_t>(args.group_min[row * groups + g]);
  }
}

constexpr int64_t kBlockBytes = kGroup * kGroup * sizeof(float);

}  // namespace

void LaunchRowMax(cudaStream_t stream, const float* weight, int64_t n, int64_t k, float* largest) {
  LaunchRows(stream, n, kThreads, 0, RowMaxKernel, weight, n, k, largest);
}
void LaunchRowStep(cudaStream_t stream, const float* largest, float clip, int64_t n, float* step) {
  LaunchBlocks(stream, Blocks(n, kThreads), RowStepKernel, largest, clip, n, step);
}
void LaunchSearchGroup(cudaStream_t stream, const RoundArgs& args, const int32_t* places, int64_t group, bool search) {
  LaunchRows(stream, args.n, kThreads, 0, SearchGroupKernel, args, places, group, search ? 4 : 1, search ? 5 : 1);
}
void LaunchSweep(cudaStream_t stream, const RoundArgs& args, const float* feedback, int64_t begin, float* loss) {
  LaunchRows(stream, args.n, kSweepThreads, kBlockBytes, SweepKernel, args, feedback, begin, loss);
}
void LaunchTakeBetter(cudaStream_t stream, const RoundArgs& args, const float* loss, bool first, const RoundArgs& best,
                      float* best_step, float* best_loss) {
  LaunchBlocks(stream, args.n, TakeBetterKernel, args, loss, first, best, best_step, best_loss);
}
void LaunchRefine(cudaStream_t stream, const RoundArgs& args, const float* hessian, const float* residual,
                  int64_t begin) {
  LaunchRows(stream, args.n, kSweepThreads, kBlockBytes, RefineKernel, args, hessian, residual, begin);
}
void LaunchErrorToValue(cudaStream_t stream, const RoundArgs& args) {
  LaunchBlocks(stream, args.n, ErrorToValueKernel, args);
}
void LaunchRefitRows(cudaStream_t stream, const RoundArgs& args, const float* product, float* step) {
  LaunchRows(stream, args.n, kThreads, 0, RefitRowsKernel, args, product, step);
}
void LaunchEnergy(cudaStream_t stream, const float* v, const float* product, double ridge, int64_t n, int64_t k,
                  double* energy) {
  LaunchRows(stream, n, kThreads, 0, EnergyKernel, v, product, ridge, n, k, energy);
}
void LaunchZeroRows(cudaStream_t stream, const float* largest, int64_t n, int64_t k, float* step, float* error) {
  LaunchBlocks(stream, n, ZeroRowsKernel, largest, k, step, error);
}
void LaunchPack(cudaStream_t stream, const PackArgs& args) { LaunchBlocks(stream, args.n, PackKernel, args); }

}  // namespace nibble::cuda
