// Thread block clusters and distributed shared memory (PTX ISA 9.7.13.4 and 5.2), sm_90.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nibble::cuda {

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Barrier of all threads of the cluster; what was written before it is visible after it. All threads of a warp together.
__device__ __forceinline__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Address in the cluster's window of the same place in block `rank`.
__device__ __forceinline__ uint32_t ClusterAddress(uint32_t shared_address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address), "r"(rank));
  return remote;
}

// Writes 16 bytes to a block of the cluster and counts them at an mbarrier there (9.7.9.7, st.async): whoever waits for
// its phase sees them. Both addresses are of the cluster's window.
__device__ __forceinline__ void StoreAsync128(uint32_t address, int4 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

}  // namespace nibble::cuda
