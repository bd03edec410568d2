#include "kernels/cuda/gemm_w4ax/kernel.cuh"

namespace nibble::cuda {

template const void* GemmKernelOf<GemmConfigIndex("r128")>();
template const void* GemmKernelOf<GemmConfigIndex("c128")>();
template const void* GemmKernelOf<GemmConfigIndex("d128")>();
template const void* GemmKernelOf<GemmConfigIndex("w128")>();

}  // namespace nibble::cuda
