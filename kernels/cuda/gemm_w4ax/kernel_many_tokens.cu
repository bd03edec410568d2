#include "kernels/cuda/gemm_w4ax/kernel.cuh"

namespace nibble::cuda {

template const void* GemmKernelOf<GemmConfigIndex("w128")>();
template const void* GemmKernelOf<GemmConfigIndex("r256")>();
template const void* GemmKernelOf<GemmConfigIndex("c256")>();

}  // namespace nibble::cuda
