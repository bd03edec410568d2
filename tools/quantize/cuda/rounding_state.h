// What a CudaRoundingDevice hands out: matrices in device memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "tools/quantize/cuda/device_array.h"
#include "tools/quantize/gptq.h"
#include "tools/quantize/rounding_order.h"

namespace nibble::cuda {

class Moments : public InputMoments {
 public:
  int64_t k() const override { return k_; }
  int64_t rows() const override { return rows_seen; }
  absl::StatusOr<std::vector<float>> Hessian() const override {
    std::vector<float> full(static_cast<size_t>(k_ * k_));
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(full.data(), gram.data(), full.size() * 4, cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (int64_t i = 0; i < k_; ++i) {
      for (int64_t j = 0; j < i; ++j) full[static_cast<size_t>(i * k_ + j)] = full[static_cast<size_t>(j * k_ + i)];
    }
    return full;
  }
  absl::StatusOr<std::vector<float>> MeanSquare() const override {
    std::vector<float> mean = Diagonal();
    for (float& x : mean) x /= static_cast<float>(std::max<int64_t>(1, rows_seen));
    return mean;
  }
  std::vector<float> Diagonal() const {
    std::vector<float> diagonal(static_cast<size_t>(k_));
    NIBBLE_CUDA_CHECK(cudaMemcpy2DAsync(diagonal.data(), 4, gram.data(), static_cast<size_t>(k_ + 1) * 4, 4,
                                        static_cast<size_t>(k_), cudaMemcpyDeviceToHost, stream_));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return diagonal;
  }

  Moments(int64_t k, cudaStream_t stream) : k_(k), stream_(stream) {}
  DeviceArray<float> gram;   // [K, K] Σ x·xᵀ; the upper triangle counts
  DeviceArray<float> cross;  // [K, K] Σ (x − coded)·codedᵀ, or empty
  int64_t rows_seen = 0;

 private:
  const int64_t k_;
  const cudaStream_t stream_;
};

// Everything in rounding order.
struct Factor : public RoundingFactor {
  ColumnOrder order;
  DeviceArray<int32_t> channel, group_of, place_of;
  DeviceArray<int32_t> places;       // [K] places of the columns of group 0, group 1, ...
  DeviceArray<float> hessian;        // [K, K] damped
  DeviceArray<float> feedback;       // [K, K] m_ij / m_jj, or empty
  DeviceArray<float> correction;     // [K, K] C·H⁻¹, or empty
  DeviceArray<float> column_weight;  // [K]
  double damping = 0, ridge = 0;
  int64_t dead_columns = 0;
  std::string fallback;
};

}  // namespace nibble::cuda
