#include "kernels/cuda/measure/matmul.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/cuda/device.h"

namespace nibble::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;

template <typename T>
__global__ void FillKernel(T* to, int64_t count, uint32_t seed, float scale) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b1u + seed;
    h = (h ^ h >> 15) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    const int sum = static_cast<int>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510;
    to[i] = static_cast<T>(scale * static_cast<float>(sum) / 147.8f);  // about N(0, scale)
  }
}

void Fill(void* to, MatmulType type, int64_t count, uint32_t seed, cudaStream_t stream) {
  switch (type) {
    case MatmulType::kBF16:
      FillKernel<<<2048, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(to), count, seed, 1.0f);
      break;
    case MatmulType::kFP8:
      FillKernel<<<2048, 256, 0, stream>>>(static_cast<__nv_fp8_e4m3*>(to), count, seed, 1.0f);
      break;
    case MatmulType::kInt8:
      FillKernel<<<2048, 256, 0, stream>>>(static_cast<int8_t*>(to), count, seed, 32.0f);
      break;
  }
}

void* Allocate(size_t bytes) {
  void* data = nullptr;
  NIBBLE_CUDA_CHECK(cudaMalloc(&data, bytes));
  return data;
}

}  // namespace

CublasMatmul::CublasMatmul(MatmulType type, int64_t n, int64_t k, int64_t rows, int64_t l2_bytes, cudaStream_t stream)
    : type_(type), stream_(stream) {
  const int64_t element = type == MatmulType::kBF16 ? 2 : 1;
  const int64_t copies = std::clamp<int64_t>(4 * l2_bytes / (n * k * element) + 1, 2, 64);
  for (int64_t i = 0; i < copies; ++i) {
    weights_.push_back(Allocate(n * k * element));
    Fill(weights_.back(), type, n * k, static_cast<uint32_t>(i), stream);
  }
  input_ = Allocate(rows * k * element);
  Fill(input_, type, rows * k, 99, stream);
  output_ = Allocate(rows * n * 4);
  workspace_ = Allocate(kWorkspaceBytes);
  scales_ = Allocate(2 * 256);  // one for each operand, aligned, or every proposal for fp8 is refused
  const float one = 1;
  NIBBLE_CUDA_CHECK(cudaMemcpyAsync(scales_, &one, sizeof(one), cudaMemcpyHostToDevice, stream));
  void* second = static_cast<uint8_t*>(scales_) + 256;
  NIBBLE_CUDA_CHECK(cudaMemcpyAsync(second, &one, sizeof(one), cudaMemcpyHostToDevice, stream));

  NIBBLE_CHECK(cublasLtCreate(&handle_) == CUBLAS_STATUS_SUCCESS, "cublasLtCreate failed");
  const bool int8 = type == MatmulType::kInt8;
  cublasLtMatmulDescCreate(&matmul_, int8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F, int8 ? CUDA_R_32I : CUDA_R_32F);
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cublasLtMatmulDescSetAttribute(matmul_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose));
  if (type == MatmulType::kFP8) {
    cublasLtMatmulDescSetAttribute(matmul_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales_, sizeof(scales_));
    cublasLtMatmulDescSetAttribute(matmul_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &second, sizeof(second));
  }
  const cudaDataType_t in = int8 ? CUDA_R_8I : type == MatmulType::kFP8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  cublasLtMatrixLayoutCreate(&w_, in, k, n, k);
  cublasLtMatrixLayoutCreate(&x_, in, k, rows, k);
  cublasLtMatrixLayoutCreate(&y_, int8 ? CUDA_R_32I : CUDA_R_16BF, n, rows, n);
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulPreferenceCreate(&preference);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                                       sizeof(kWorkspaceBytes));
  if (cublasLtMatmulAlgoGetHeuristic(handle_, matmul_, w_, x_, y_, y_, preference, kProposals, proposals_, &found_) !=
      CUBLAS_STATUS_SUCCESS) {
    found_ = 0;
  }
  cublasLtMatmulPreferenceDestroy(preference);
}

CublasMatmul::~CublasMatmul() {
  (void)cudaStreamSynchronize(stream_);
  cublasLtMatrixLayoutDestroy(w_);
  cublasLtMatrixLayoutDestroy(x_);
  cublasLtMatrixLayoutDestroy(y_);
  cublasLtMatmulDescDestroy(matmul_);
  cublasLtDestroy(handle_);
  for (void* weight : weights_) (void)cudaFree(weight);
  for (void* memory : {input_, output_, workspace_, scales_}) (void)cudaFree(memory);
}

bool CublasMatmul::Works(int proposal) {
  return proposals_[proposal].state == CUBLAS_STATUS_SUCCESS && Run(proposal, 0) == CUBLAS_STATUS_SUCCESS;
}

void CublasMatmul::Issue(int proposal, int launch) {
  NIBBLE_CHECK(Run(proposal, launch) == CUBLAS_STATUS_SUCCESS, "cublasLtMatmul failed");
}

cublasStatus_t CublasMatmul::Run(int proposal, int launch) {
  const float one = 1, zero = 0;
  const int32_t int_one = 1, int_zero = 0;
  const bool int8 = type_ == MatmulType::kInt8;
  return cublasLtMatmul(handle_, matmul_, int8 ? static_cast<const void*>(&int_one) : &one, weights_[launch % weights_.size()], w_,
                        input_, x_, int8 ? static_cast<const void*>(&int_zero) : &zero, output_, y_, output_, y_,
                        &proposals_[proposal].algo, workspace_, kWorkspaceBytes, stream_);
}

}  // namespace nibble::cuda
