#include "kernels/cuda/gemm_w4ax/kernel.cuh"

namespace nibble::cuda {

template const void* GemmKernelOf<GemmConfigIndex("d16")>();
template const void* GemmKernelOf<GemmConfigIndex("e16")>();
template const void* GemmKernelOf<GemmConfigIndex("e32")>();

}  // namespace nibble::cuda
