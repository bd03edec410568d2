#include "tools/quantize/cuda/gpu.h"

#include "common/base/check.h"

namespace nibble::cuda {

#define NIBBLE_CUBLAS_CHECK(call) NIBBLE_CHECK((call) == CUBLAS_STATUS_SUCCESS, #call)
#define NIBBLE_CUSOLVER_CHECK(call) NIBBLE_CHECK((call) == CUSOLVER_STATUS_SUCCESS, #call)

Gpu::Gpu() {
  NIBBLE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  NIBBLE_CUBLAS_CHECK(cublasCreate(&blas_));
  NIBBLE_CUBLAS_CHECK(cublasSetStream(blas_, stream_));
  NIBBLE_CUBLAS_CHECK(cublasSetMathMode(blas_, CUBLAS_DEFAULT_MATH));  // f32 stays f32: no TF32
  NIBBLE_CUSOLVER_CHECK(cusolverDnCreate(&solver_));
  NIBBLE_CUSOLVER_CHECK(cusolverDnSetStream(solver_, stream_));
  NIBBLE_CUSOLVER_CHECK(cusolverDnCreateParams(&parameters_));
}

Gpu::~Gpu() {
  cusolverDnDestroyParams(parameters_);
  cusolverDnDestroy(solver_);
  cublasDestroy(blas_);
  cudaStreamDestroy(stream_);
}

// The libraries see columns where there are rows: they are given the transposed problem.
void Gpu::Multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
                   float beta, float* c, int64_t ldc) const {
  const float one = 1;
  NIBBLE_CUBLAS_CHECK(cublasSgemm_64(blas_, CUBLAS_OP_N, CUBLAS_OP_N, n, m, k, &one, b, ldb, a, lda, &beta, c, ldc));
}

void Gpu::AddProduct(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t k, float* to) const {
  const float one = 1;
  NIBBLE_CUBLAS_CHECK(cublasGemmEx_64(blas_, CUBLAS_OP_N, CUBLAS_OP_T, k, k, rows, &one, b, CUDA_R_16BF, k, a,
                                      CUDA_R_16BF, k, &one, to, CUDA_R_32F, k, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT));
}

absl::StatusOr<int> Gpu::Cholesky(int64_t k, double* a) {
  size_t device_bytes = 0, host_bytes = 0;
  NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrf_bufferSize(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, CUDA_R_64F, a, k,
                                                    CUDA_R_64F, &device_bytes, &host_bytes));
  NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<uint8_t> workspace, Allocate<uint8_t>(static_cast<int64_t>(device_bytes)));
  NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<int> info, Zeros<int>(1));
  std::vector<uint8_t> host_workspace(host_bytes);
  NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrf(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, CUDA_R_64F, a, k, CUDA_R_64F,
                                         workspace.data(), device_bytes, host_workspace.data(), host_bytes,
                                         info.data()));
  int minor = 0;
  NIBBLE_CUDA_CHECK(cudaMemcpyAsync(&minor, info.data(), sizeof(int), cudaMemcpyDeviceToHost, stream_));
  NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
  NIBBLE_CHECK(minor >= 0, "cusolverDnXpotrf");
  return minor;
}

absl::Status Gpu::SolveRows(int64_t k, const double* lower, double* b) {
  NIBBLE_ASSIGN_OR_RETURN(const DeviceArray<int> info, Zeros<int>(1));
  NIBBLE_CUSOLVER_CHECK(cusolverDnXpotrs(solver_, parameters_, CUBLAS_FILL_MODE_UPPER, k, k, CUDA_R_64F, lower, k,
                                         CUDA_R_64F, b, k, info.data()));
  Synchronize();  // info ends here
  return absl::OkStatus();
}

}  // namespace nibble::cuda
