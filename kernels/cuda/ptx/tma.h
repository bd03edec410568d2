// Copies of boxes of a two-dimensional tensor (PTX ISA 9.7.9.27, cp.async.bulk.tensor), sm_90. The tensor map is made
// on the host and passed as a __grid_constant__ parameter. Elements outside the tensor arrive as zeros and count as
// bytes of the copy.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace nibble::cuda {

// Box with its first element at (column, row) to shared memory; arrives with the box's bytes at the mbarrier.
__device__ __forceinline__ void TmaLoad2D(uint32_t to_shared, const CUtensorMap* map, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to_shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to the same place in every block of the cluster whose bit is set in `blocks`; arrives at each one's mbarrier.
__device__ __forceinline__ void TmaMulticast2D(uint32_t to_shared, const CUtensorMap* map, int column, int row,
                                               uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to_shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void TmaPrefetchDescriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace nibble::cuda
