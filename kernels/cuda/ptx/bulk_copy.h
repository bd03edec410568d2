// Asynchronous copies of contiguous bytes (PTX ISA 9.7.9.25, cp.async.bulk), sm_90. One thread starts a copy; addresses
// and sizes are multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace nibble::cuda {

// How long the second-level cache should keep what a copy reads.
__device__ __forceinline__ uint64_t L2EvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t L2EvictNormal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Global to shared memory; arrives with `bytes` at the mbarrier.
__device__ __forceinline__ void BulkCopy(uint32_t to_shared, const void* from, uint32_t bytes, uint32_t barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to_shared),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void BulkCopy(uint32_t to_shared, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   to_shared),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Orders what this thread saw written to global memory before the copies that it starts afterwards.
__device__ __forceinline__ void FenceGlobalBeforeCopy() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace nibble::cuda
