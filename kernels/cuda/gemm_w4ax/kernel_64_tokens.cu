#include "kernels/cuda/gemm_w4ax/kernel.cuh"

namespace nibble::cuda {

template const void* GemmKernelOf<GemmConfigIndex("e64")>();
template const void* GemmKernelOf<GemmConfigIndex("c64")>();
template const void* GemmKernelOf<GemmConfigIndex("w64")>();

}  // namespace nibble::cuda
