// The W4Ax kernel for sm_80 to sm_89.
//
// A 4-bit block adds (s2 · Σ a4 · q4) << e, a product of the 4-bit tensor cores, a shift and a multiply-add; an 8-bit
// block adds Σ x8 · w8 with w8 unpacked in registers (one multiply-add and one xor for four, docs/numerics.md). The
// minima of the 4-bit blocks, Σ_blocks m · (Σ a4 << e), are themselves a product of depth K/128: the 8-bit tensor cores
// compute it once per tile from the sums of codes, in two halves of seven bits, which leaves the inner loop one
// multiply-add per sum and block. Everything is exact in int32.
#include <cuda_bf16.h>

#include "kernels/cuda/gemm_sm80/kernel.h"
#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mma_int.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda::sm80 {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#error "4-bit mma is emulated from sm_90 on; gemm_w4ax is for those"
#endif

// Lane 4g + c, and the warp's corner of the tile.
struct Place {
  int thread, g, c, row, token;
};

template <int kIndex>
__device__ __forceinline__ Place PlaceOf() {
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  return {.thread = thread,
          .g = lane >> 2,
          .c = lane & 3,
          .row = warp % kConfig.row_warps * kConfig.warp_rows(),
          .token = warp / kConfig.row_warps * kConfig.warp_tokens()};
}

// Sums of a thread: [16 rows][8 tokens] fragments of the warp's part of the tile.
template <int kIndex>
struct Sums {
  static constexpr int kRowFragments = kGemmConfigs[kIndex].warp_rows() / 16;
  static constexpr int kTokenFragments = kGemmConfigs[kIndex].warp_tokens() / 8;
  int32_t of[kRowFragments][kTokenFragments][4];
};

// Whole sixteens of bytes, by all threads.
__device__ __forceinline__ void CopyTile(uint32_t to, const uint8_t* from, int bytes, int thread) {
  for (int at = thread * 16; at < bytes; at += kThreads * 16) CopyAsync16(to + at, from + at, true);
}

template <int kIndex>
__device__ __forceinline__ void CopyStep(const GemmParams& p, const WorkItem& item, int step, uint32_t stage,
                                         int thread) {
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  constexpr int kUnit = kConfig.tokens * kUnitBytes;
  const int64_t padded = p.input.padded_tokens, token = int64_t{item.token_tile} * kConfig.tokens;
  CopyTile(stage, p.weights + (int64_t{item.row_tile} * p.split.steps() + step) * kWeightBlockBytes, kWeightBlockBytes,
           thread);
  const uint32_t to = stage + kWeightBlockBytes;
  const int four_bit = p.split.four_bit_steps;
  if (step < four_bit) {
    CopyTile(to, p.input.units + (step * padded + token) * kUnitBytes, kUnit, thread);
    CopyTile(stage + kConfig.exponents_at(), p.input.exponents + step * padded + token, kConfig.tokens, thread);
  } else {
    const int64_t unit = four_bit + 2 * (step - four_bit);
    CopyTile(to, p.input.units + (unit * padded + token) * kUnitBytes, kUnit, thread);
    CopyTile(to + kUnit, p.input.units + ((unit + 1) * padded + token) * kUnitBytes, kUnit, thread);
  }
}

// s2 in the low byte, m + 128 in the next.
__device__ __forceinline__ uint32_t LoadScales(uint32_t stage, int row) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(stage + kCodeBytes + 2 * row));
  return value;
}

template <int kIndex>
__device__ __forceinline__ void MultiplyFourBit(uint32_t stage, const Place& at, Sums<kIndex>& sums) {
  using S = Sums<kIndex>;
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  uint4 b[S::kTokenFragments];
  uint32_t exponents[S::kTokenFragments];  // of tokens 2c and 2c + 1
#pragma unroll
  for (int j = 0; j < S::kTokenFragments; ++j) {
    const int token = at.token + 8 * j;
    b[j] = LoadShared128(stage + kWeightBlockBytes + (token + at.g) * kUnitBytes + 16 * at.c);
    uint16_t two;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(two) : "r"(stage + kConfig.exponents_at() + token + 2 * at.c));
    exponents[j] = two;
  }
#pragma unroll
  for (int i = 0; i < S::kRowFragments; ++i) {
    const int row = at.row + 16 * i + at.g;
    const uint4 low = LoadShared128(stage + row * 64 + 16 * at.c);
    const uint4 high = LoadShared128(stage + (row + 8) * 64 + 16 * at.c);
    const int low_scale = static_cast<int>(LoadScales(stage, row) & 255);
    const int high_scale = static_cast<int>(LoadScales(stage, row + 8) & 255);
#pragma unroll
    for (int j = 0; j < S::kTokenFragments; ++j) {
      int32_t dots[4] = {0, 0, 0, 0};
      MmaU4S4(dots, low.x, high.x, low.y, high.y, b[j].x, b[j].y);
      MmaU4S4(dots, low.z, high.z, low.w, high.w, b[j].z, b[j].w);
      const uint32_t e0 = exponents[j] & 255, e1 = exponents[j] >> 8;
      sums.of[i][j][0] += low_scale * (dots[0] << e0);
      sums.of[i][j][1] += low_scale * (dots[1] << e1);
      sums.of[i][j][2] += high_scale * (dots[2] << e0);
      sums.of[i][j][3] += high_scale * (dots[3] << e1);
    }
  }
}

// w8 of four codes, one a byte.
__device__ __forceinline__ uint32_t Unpack(uint32_t codes, uint32_t scale, uint32_t minima) {
  return ((codes & 0x0f0f0f0fu) * scale + minima) ^ 0x80808080u;
}

__device__ __forceinline__ uint32_t Word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int kIndex>
__device__ __forceinline__ void MultiplyEightBit(uint32_t stage, const Place& at, Sums<kIndex>& sums) {
  using S = Sums<kIndex>;
  constexpr int kUnit = kGemmConfigs[kIndex].tokens * kUnitBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 b[S::kTokenFragments];
#pragma unroll
    for (int j = 0; j < S::kTokenFragments; ++j) {
      b[j] = LoadShared128(stage + kWeightBlockBytes + half * kUnit + (at.token + 8 * j + at.g) * kUnitBytes + 16 * at.c);
    }
#pragma unroll
    for (int i = 0; i < S::kRowFragments; ++i) {
      const int row = at.row + 16 * i + at.g;
      const uint2 low = LoadShared64(stage + row * 64 + 16 * at.c + 8 * half);
      const uint2 high = LoadShared64(stage + (row + 8) * 64 + 16 * at.c + 8 * half);
      const uint32_t low_scales = LoadScales(stage, row), high_scales = LoadScales(stage, row + 8);
      const uint32_t low_scale = low_scales & 255, low_minima = (low_scales >> 8) * 0x01010101u;
      const uint32_t high_scale = high_scales & 255, high_minima = (high_scales >> 8) * 0x01010101u;
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const uint32_t low_codes = word == 0 ? low.x : low.y, high_codes = word == 0 ? high.x : high.y;
        const uint32_t a0 = Unpack(low_codes, low_scale, low_minima);
        const uint32_t a1 = Unpack(high_codes, high_scale, high_minima);
        const uint32_t a2 = Unpack(low_codes >> 4, low_scale, low_minima);
        const uint32_t a3 = Unpack(high_codes >> 4, high_scale, high_minima);
#pragma unroll
        for (int j = 0; j < S::kTokenFragments; ++j) {
          MmaS8(sums.of[i][j], a0, a1, a2, a3, Word(b[j], 2 * word), Word(b[j], 2 * word + 1));
        }
      }
    }
  }
}

// Adds Σ_steps m · (128 · high + low) over all 4-bit steps, from global memory: once per tile.
template <int kIndex>
__device__ __forceinline__ void MultiplyMinima(const GemmParams& p, const WorkItem& item, const Place& at,
                                               Sums<kIndex>& sums) {
  using S = Sums<kIndex>;
  const int8_t* minima = p.minima + (int64_t{item.row_tile} * kTileRows + at.row + at.g) * p.depth + 4 * at.c;
  const int64_t token = int64_t{item.token_tile} * kGemmConfigs[kIndex].tokens + at.token + at.g;
  auto load = [](const int8_t* from) { return __ldg(reinterpret_cast<const uint32_t*>(from)); };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int8_t* codes = (half == 0 ? p.input.high : p.input.low) + token * p.depth + 4 * at.c;
#pragma unroll 1
    for (int k = 0; k < p.depth; k += 32) {
      uint32_t b[S::kTokenFragments][2];
#pragma unroll
      for (int j = 0; j < S::kTokenFragments; ++j) {
        b[j][0] = load(codes + 8 * j * p.depth + k);
        b[j][1] = load(codes + 8 * j * p.depth + k + 16);
      }
#pragma unroll
      for (int i = 0; i < S::kRowFragments; ++i) {
        const int8_t* row = minima + 16 * i * p.depth + k;
        const uint32_t a0 = load(row), a1 = load(row + 8 * p.depth);
        const uint32_t a2 = load(row + 16), a3 = load(row + 8 * p.depth + 16);
#pragma unroll
        for (int j = 0; j < S::kTokenFragments; ++j) MmaS8(sums.of[i][j], a0, a1, a2, a3, b[j][0], b[j][1]);
      }
    }
    if (half == 0) {
#pragma unroll
      for (int i = 0; i < S::kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < S::kTokenFragments; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) sums.of[i][j][r] *= 128;
        }
      }
    }
  }
}

// For a tile whose K is cut: leaves this worker's sums, and if it is the last of the tile's workers to do so adds those
// of the others. True when `sums` are the tile's. Nobody waits for anybody.
template <int kIndex>
__device__ __forceinline__ bool ShareSums(const GemmParams& p, const WorkItem& item, int worker, const Place& at,
                                          Sums<kIndex>& sums) {
  using S = Sums<kIndex>;
  constexpr int64_t kTile = kTileRows * kGemmConfigs[kIndex].tokens;
  // A worker opens at most one shared tile, its last, and continues at most one, its first.
  auto slot = [&](int of, bool opens) { return p.partials + (2 * of + (opens ? 1 : 0)) * kTile + at.thread; };
  const int64_t first_step = int64_t{item.stream} * p.split.steps();
  const int first = p.split.WorkerOf(first_step), last = p.split.WorkerOf(first_step + p.split.steps() - 1);
  int32_t* mine = slot(worker, worker == first);
  int index = 0;
#pragma unroll
  for (int i = 0; i < S::kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < S::kTokenFragments; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) mine[index++ * kThreads] = sums.of[i][j][r];
    }
  }
  __threadfence();
  __shared__ bool last_to_come;
  __syncthreads();
  if (at.thread == 0) last_to_come = atomicAdd(p.arrivals + item.stream, 1) == last - first;
  __syncthreads();
  if (!last_to_come) return false;
  __threadfence();
  for (int other = first; other <= last; ++other) {
    if (other == worker) continue;
    const int32_t* theirs = slot(other, other == first);
    index = 0;
#pragma unroll
    for (int i = 0; i < S::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < S::kTokenFragments; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums.of[i][j][r] += __ldcg(theirs + index++ * kThreads);
      }
    }
  }
  return true;
}

__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Scales the sums and writes them as rows of the output, turned in shared memory, which no copy is on its way to.
template <int kIndex>
__device__ __forceinline__ void StoreTile(const GemmParams& p, const WorkItem& item, const Place& at, uint8_t* memory,
                                          const Sums<kIndex>& sums) {
  using S = Sums<kIndex>;
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  constexpr int kStride = GemmConfig::output_stride();
  auto* tile = reinterpret_cast<float*>(memory);
  const int first_row = item.row_tile * kTileRows, first_token = item.token_tile * kConfig.tokens;
#pragma unroll
  for (int j = 0; j < S::kTokenFragments; ++j) {
    const int token = at.token + 8 * j + 2 * at.c;
    float token_scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      token_scale[i] = first_token + token + i < p.rows ? p.token_scale[first_token + token + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < S::kRowFragments; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = at.row + 16 * i + at.g + r / 2 * 8;
        const float scale = __fmul_rn(token_scale[r % 2], __ldg(p.channel_scale + first_row + row));
        float y = __fmul_rn(__int2float_rn(sums.of[i][j][r]), scale);
        if (p.bias != nullptr && first_row + row < p.n) y = __fadd_rn(y, __ldg(p.bias + first_row + row));
        tile[(token + r % 2) * kStride + row] = y;
      }
    }
  }
  __syncthreads();
  const bool aligned = p.n % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  constexpr int kEights = kTileRows / 8;
#pragma unroll 1
  for (int index = at.thread; index < kConfig.tokens * kEights; index += kThreads) {
    const int token = index / kEights, row = index % kEights * 8, n = first_row + row;
    if (first_token + token >= p.rows || n >= p.n) continue;
    const float* y = tile + token * kStride + row;
    const int64_t to = int64_t{first_token + token} * p.n + n;
    if (p.bf16 && aligned) {
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + to) =
          make_uint4(PackBF16(y[0], y[1]), PackBF16(y[2], y[3]), PackBF16(y[4], y[5]), PackBF16(y[6], y[7]));
      continue;
    }
    for (int i = 0; i < 8 && n + i < p.n; ++i) {
      if (p.bf16) {
        static_cast<__nv_bfloat16*>(p.out)[to + i] = __float2bfloat16_rn(y[i]);
      } else {
        static_cast<float*>(p.out)[to + i] = y[i];
      }
    }
  }
  __syncthreads();
}

template <int kIndex>
__global__ void __launch_bounds__(kThreads, 1) Gemm(const __grid_constant__ GemmParams p) {
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = SharedAddress(memory);
  const Place at = PlaceOf<kIndex>();
  const int worker = static_cast<int>(blockIdx.x);
  WorkItem item;
  for (Schedule schedule(p.split, worker); schedule.Next(p.split, &item);) {
    Sums<kIndex> sums{};
    int stage = 0;  // of the next step to multiply
#pragma unroll
    for (int ahead = 0; ahead < kConfig.stages - 1; ++ahead) {
      if (item.begin + ahead < item.end) {
        CopyStep<kIndex>(p, item, item.begin + ahead, shared + ahead * kConfig.stage_bytes(), at.thread);
      }
      CopyAsyncCommit();
    }
    if (item.begin == 0) MultiplyMinima<kIndex>(p, item, at, sums);
#pragma unroll 1
    for (int step = item.begin; step < item.end; ++step) {
      CopyAsyncWait<kConfig.stages - 2>();
      __syncthreads();  // the step is there for all, and the one before it multiplied by all
      const int next = step + kConfig.stages - 1, free = stage == 0 ? kConfig.stages - 1 : stage - 1;
      if (next < item.end) CopyStep<kIndex>(p, item, next, shared + free * kConfig.stage_bytes(), at.thread);
      CopyAsyncCommit();
      const uint32_t here = shared + stage * kConfig.stage_bytes();
      if (step < p.split.four_bit_steps) {
        MultiplyFourBit<kIndex>(here, at, sums);
      } else {
        MultiplyEightBit<kIndex>(here, at, sums);
      }
      stage = stage + 1 == kConfig.stages ? 0 : stage + 1;
    }
    CopyAsyncWaitAll();
    __syncthreads();
    if (item.stream >= 0 && !ShareSums<kIndex>(p, item, worker, at, sums)) continue;
    StoreTile<kIndex>(p, item, at, memory, sums);
  }
}

template <int kIndex>
void LaunchOne(const Device& device, const GemmParams& params) {
  constexpr int kShared = kGemmConfigs[kIndex].shared_bytes();
  AllowSharedMemory(Gemm<kIndex>, kShared);
  Launch(device, Gemm<kIndex>, params.split.workers, kThreads, kShared, params);
}

}  // namespace

void LaunchGemm(const Device& device, const GemmPlan& plan, GemmParams params) {
  using Function = void (*)(const Device&, const GemmParams&);
  static constexpr Function kLaunch[] = {&LaunchOne<0>, &LaunchOne<1>, &LaunchOne<2>, &LaunchOne<3>};
  static_assert(sizeof(kLaunch) / sizeof(kLaunch[0]) == kNumGemmConfigs);
  params.split = plan.split;
  kLaunch[plan.config](device, params);
}

}  // namespace nibble::cuda::sm80
