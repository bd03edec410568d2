// Barriers of a block that have numbers, 0 to 15; 0 is that of __syncthreads (PTX ISA 9.7.13.1, barrier). A phase ends
// when `threads` have come, whole warps, whether they wait (sync) or go on (arrive). What a thread has read and written
// before it comes is done before those who wait go on.
#pragma once

namespace nibble::cuda {

template <int kThreads>
__device__ __forceinline__ void BarrierSync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void BarrierArrive(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

}  // namespace nibble::cuda
