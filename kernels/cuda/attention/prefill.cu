// Prefill attention; docs/kernels-attention.md shows the pipeline.
//
// A block computes tiles of 128 (row, query head) pairs that share a KV head: consecutive rows of one sequence with all
// heads of the group. One warpgroup unpacks codes into f16 operands in shared memory, page after page; two warpgroups
// of 64 pairs each run S = Q · Kᵀ and O += P · V on them. Pages of a chunk are taken stream by stream, so that the chain
// of steps into an accumulator, its rescalings and the folds are those of the decode kernel (canonical.cuh).
//
// A page whose tokens all lie behind a row adds nothing to it, to the bit: its scores are -inf, its probabilities 0.
#include "kernels/cuda/attention/prefill.h"

#include "kernels/cuda/attention/prefill_attend.cuh"
#include "kernels/cuda/attention/prefill_unpack.cuh"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = kWarpgroupThreads * (1 + kMultipliers);

// Registers per thread after the launch's 168 have been shared out again.
constexpr int kUnpackRegisters = 56;
constexpr int kAttendRegisters = 224;

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ PrefillParameters p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  PrefillShared<kHeadDim>* shared = reinterpret_cast<PrefillShared<kHeadDim>*>(shared_bytes);
  GridDependencyLaunch();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      MbarrierInit(SharedAddress(&shared->k_full[i]), kPageWarps * 32);
      MbarrierInit(SharedAddress(&shared->v_full[i]), kPageWarps * 32);
    }
    MbarrierInitFence();
  }
  __syncthreads();
  GridDependencyWait();
  // The shuffle tells the compiler that it is uniform: else it does not use the registers that follow.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kUnpackRegisters));
    UnpackPages<kHeadDim>(p, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kAttendRegisters));
    Attend<kHeadDim>(p, warpgroup - 1, shared);
  }
}

template <int kHeadDim>
void LaunchPrefill(const Device& device, const AttentionArgs& args) {
  const int64_t kv_heads = args.pages.layout.kv_heads, group = args.q_heads / kv_heads;
  const int64_t tile_rows = kTileQueries / group;
  const PrefillParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .pages = args.pages.data,
      .q = static_cast<const __nv_bfloat16*>(args.qkv.data),
      .out = static_cast<__nv_bfloat16*>(args.out.data),
      .q_stride = args.qkv.cols,
      .out_stride = args.out.cols,
      .kv_heads = static_cast<int>(kv_heads),
      .group = static_cast<int>(group),
      .group_inverse = static_cast<uint32_t>((65535 + group) / group),
      .tile_rows = static_cast<int>(tile_rows),
      .scale_log2e = args.scale * 1.4426950408889634f,
      .folded = device.Scratch<float4>(PrefillScratchBytes(device.multiprocessors, kHeadDim)),
  };
  constexpr int kSharedBytes = sizeof(PrefillShared<kHeadDim>);
  AllowSharedMemory(PrefillKernel<kHeadDim>, kSharedBytes);
  const int64_t most_tiles = (args.step.rows / tile_rows + args.step.sequences) * kv_heads;
  const int64_t blocks = most_tiles < device.multiprocessors ? most_tiles : device.multiprocessors;
  Launch(device, PrefillKernel<kHeadDim>, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), kSharedBytes, parameters);
}

}  // namespace

int64_t PrefillScratchBytes(int multiprocessors, int64_t head_dim) {
  return int64_t{multiprocessors} * kMultipliers * 2 * (head_dim / 8 + 2) * kWarpgroupThreads *
         static_cast<int64_t>(sizeof(float4));
}

void PrefillAttention(const Device& device, const AttentionArgs& args) {
  if (args.pages.layout.head_dim == 128) {
    LaunchPrefill<128>(device, args);
  } else {
    LaunchPrefill<64>(device, args);
  }
}

}  // namespace nibble::cuda
