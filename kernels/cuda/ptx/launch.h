// Programmatic dependent launch (PTX ISA 9.7.13.12, griddepcontrol); no-ops before sm_90.
#pragma once

namespace nibble::cuda {

// Returns when every earlier grid of the stream has finished and its writes are visible.
__device__ __forceinline__ void GridDependencyWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start its prologue.
__device__ __forceinline__ void GridDependencyLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace nibble::cuda
