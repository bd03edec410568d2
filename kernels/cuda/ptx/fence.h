// Memory fences (PTX ISA 9.7.13.4, membar/fence).
#pragma once

namespace nibble::cuda {

// Orders this thread's ordinary accesses to shared memory before asynchronous copies and matrix operations that are
// started after the barrier which follows.
__device__ __forceinline__ void FenceProxyAsync() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace nibble::cuda
