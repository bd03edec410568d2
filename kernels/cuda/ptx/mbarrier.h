// Barriers in shared memory that count arrivals and bytes of asynchronous copies (PTX ISA 9.7.13.15, mbarrier), sm_90.
// A barrier is 8 bytes of shared memory, named by its shared address. A phase completes when the expected arrivals and
// all announced bytes have come; waiting names the parity of the phase, which starts at 0 and flips with each.
#pragma once

#include <cstdint>

namespace nibble::cuda {

__device__ __forceinline__ void MbarrierInit(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits of one thread and before the block's (or cluster's) barrier: makes them visible to asynchronous
// copies and to the other blocks of the cluster.
__device__ __forceinline__ void MbarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives and announces `bytes` that copies will bring in this phase.
__device__ __forceinline__ void MbarrierArriveExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void MbarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same address in block `rank` of the cluster, after this thread's own reads of shared
// memory. Orders nothing else: data goes with StoreAsync128 (cluster.h).
__device__ __forceinline__ void MbarrierArriveRemote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier), "r"(rank)
      : "memory");
}

inline constexpr uint32_t kSuspendNanoseconds = 10'000'000;

// True once the phase of this parity has completed; may suspend the thread for a while, at most the hint, before it
// says false. Without a hint threads that wait for long take issue slots from the others.
__device__ __forceinline__ bool MbarrierTryWait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2, %3;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity), "n"(kSuspendNanoseconds)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void MbarrierWait(uint32_t barrier, uint32_t parity) {
  while (!MbarrierTryWait(barrier, parity)) {
  }
}

}  // namespace nibble::cuda
