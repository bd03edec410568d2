// A GPU with its libraries on one stream, and the matrix operations that rounding needs of them.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "tools/quantize/cuda/device_array.h"

namespace nibble::cuda {

// Everything is queued on stream(); Download's targets are valid after Synchronize. Matrices are row-major.
class Gpu {
 public:
  Gpu();
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  cudaStream_t stream() const { return stream_; }
  MemoryMeter& meter() { return meter_; }
  void Synchronize() const { NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_)); }

  template <typename T>
  absl::StatusOr<DeviceArray<T>> Allocate(int64_t size) {
    return DeviceArray<T>::Allocate(size, &meter_);
  }
  template <typename T>
  absl::StatusOr<DeviceArray<T>> Zeros(int64_t size) {
    NIBBLE_ASSIGN_OR_RETURN(DeviceArray<T> array, Allocate<T>(size));
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(array.data(), 0, static_cast<size_t>(size) * sizeof(T), stream_));
    return array;
  }
  template <typename T>
  void Upload(const std::vector<T>& from, T* to) const {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream_));
  }
  template <typename T>
  void Download(const T* from, std::vector<T>* to) const {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to->data(), from, to->size() * sizeof(T), cudaMemcpyDeviceToHost, stream_));
  }
  // From device or host memory.
  void Copy(const float* from, int64_t count, float* to) const {
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * 4, cudaMemcpyDefault, stream_));
  }

  // c [M, N] = beta c + a [M, K] · b [K, N] in f32; ld* are distances of rows.
  void Multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float beta,
                float* c, int64_t ldc) const;
  // to [K, K] += aᵀ·b for bf16 a, b [rows, K]: exact products, f32 sums.
  void AddProduct(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t k, float* to) const;

  // a [K, K] symmetric becomes its lower Cholesky factor. Returns 0, or the leading minor that is not positive
  // definite.
  absl::StatusOr<int> Cholesky(int64_t k, double* a);
  // The rows of b [K, K] become x with x·a = b, given a's lower Cholesky factor.
  absl::Status SolveRows(int64_t k, const double* lower, double* b);

 private:
  cudaStream_t stream_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  cusolverDnHandle_t solver_ = nullptr;
  cusolverDnParams_t parameters_ = nullptr;
  MemoryMeter meter_;
};

}  // namespace nibble::cuda
