// prefetch (PTX ISA 9.7.9.15): a hint, never a fault.
#pragma once

namespace nibble::cuda {

// Brings the 128-byte line of a global address into the L2.
__device__ __forceinline__ void PrefetchL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace nibble::cuda
