// Copies of a few bytes from global to shared memory that a thread starts and waits for itself (PTX ISA 9.7.9.25.3,
// cp.async), sm_80.
#pragma once

#include <cstdint>

namespace nibble::cuda {

// Four bytes, or zeros when `valid` is false (then `from` is not read).
__device__ __forceinline__ void CopyAsync4(uint32_t to_shared, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to_shared), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// Sixteen bytes past the first-level cache, or zeros when `valid` is false.
__device__ __forceinline__ void CopyAsync16(uint32_t to_shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of copies; CopyAsyncWait<n> returns when all but the newest n groups of this thread have arrived.
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ void CopyAsyncWaitAll() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace nibble::cuda
