#include "kernels/cuda/gemm_w4ax/kernel.cuh"

namespace nibble::cuda {

template const void* GemmKernelOf<GemmConfigIndex("r176")>();
template const void* GemmKernelOf<GemmConfigIndex("r256")>();
template const void* GemmKernelOf<GemmConfigIndex("c256")>();
template const void* GemmKernelOf<GemmConfigIndex("m256")>();

}  // namespace nibble::cuda
