// Counters in global memory that pass data between thread blocks (PTX ISA 8, memory consistency model).
#pragma once

#include <cstdint>

namespace nibble::cuda {

// Adds after everything this thread, and whoever it synchronized with, wrote before.
__device__ __forceinline__ void ReduceAddRelease(int32_t* counter, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// What was written before the additions that this load sees is visible after it.
__device__ __forceinline__ int32_t LoadAcquire(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

}  // namespace nibble::cuda
