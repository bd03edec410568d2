// cuBLASLt's matrix products, the baselines of linear layers.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/measure/measure.h"

namespace nibble::cuda {

// y[rows, n] = x[rows, k] · w[n, k]^T with random x and several random w.
class CublasMatmul {
 public:
  CublasMatmul(MatmulType type, int64_t n, int64_t k, int64_t rows, int64_t l2_bytes, cudaStream_t stream);
  ~CublasMatmul();
  CublasMatmul(const CublasMatmul&) = delete;
  CublasMatmul& operator=(const CublasMatmul&) = delete;

  // The library's best guesses, at most kProposals. It does not always guess the fastest first.
  int proposals() const { return found_; }
  bool Works(int proposal);
  void Issue(int proposal, int launch);

 private:
  static constexpr int kProposals = 6;

  cublasStatus_t Run(int proposal, int launch);

  MatmulType type_;
  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t matmul_ = nullptr;
  cublasLtMatrixLayout_t w_ = nullptr, x_ = nullptr, y_ = nullptr;
  cublasLtMatmulHeuristicResult_t proposals_[kProposals];
  int found_ = 0;
  std::vector<void*> weights_;
  void *input_ = nullptr, *output_ = nullptr, *workspace_ = nullptr, *scales_ = nullptr;
};

}  // namespace nibble::cuda
