// The W4Ax kernel. One warpgroup copies: its first warp weights, its second activations, both through one ring of
// steps. Two warpgroups multiply: they unpack weights in registers, as operand A of wgmma, and read activations, its
// operand B, from shared memory. docs/kernels-gemm.md draws it.
//
// Registers are shared out again after the launch (setmaxnreg): the copying warps give theirs to the others. The sums
// of both sides must be what the launch allocated, or the kernel never starts.
#pragma once

#include "kernels/cuda/gemm_w4ax/copying.cuh"
#include "kernels/cuda/gemm_w4ax/multiplying.cuh"

namespace nibble::cuda::gemm {

template <int kIndex>
__global__ void __launch_bounds__(128 * (kConsumers + 1), kGemmConfigs[kIndex].residents)
    W4AxGemm(const __grid_constant__ CUtensorMap activations, const __grid_constant__ GemmParams p) {
  constexpr GemmConfig kConfig = kGemmConfigs[kIndex];
  constexpr int kCopyRegisters = 40, kMultiplyRegisters = kConfig.residents > 1 ? 96 : 232;
  extern __shared__ __align__(1024) uint8_t shared[];
  const MultiplyingBlock<kIndex> block(p, shared);
  if (threadIdx.x == 0) {
    if (block.base % 1024 != 0) __trap();
    block.InitBarriers();
  }
  if constexpr (kConfig.cluster > 1) {
    ClusterSync();
  } else {
    __syncthreads();
  }
  GridDependencyLaunch();
  const int warp = threadIdx.x / 32;
  if (warp >= 4 * kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    if (warp == 4 * kConsumers && threadIdx.x % 32 == 0) {
      int64_t cycles = clock64(), nanoseconds;
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
      block.CopyWeights();
      if (p.clock != nullptr && blockIdx.x == 0) {
        int64_t end;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
        p.clock[0] = clock64() - cycles;
        p.clock[1] = end - nanoseconds;
      }
    } else if (warp == 4 * kConsumers + 1 && threadIdx.x % 32 == 0) {
      TmaPrefetchDescriptor(&activations);
      GridDependencyWait();
      block.CopyActivations(&activations);
    } else if (kConfig.streams() && warp == 4 * kConsumers + 2 && threadIdx.x % 32 == 0) {
      block.AnnounceSums();
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
    block.Consume();
  }
  if constexpr (kConfig.cluster > 1) ClusterSync();  // no block leaves while its peer still writes to it
}

}  // namespace nibble::cuda::gemm

namespace nibble::cuda {

template <int kIndex>
const void* GemmKernelOf() {
  return reinterpret_cast<const void*>(&gemm::W4AxGemm<kIndex>);
}

}  // namespace nibble::cuda
