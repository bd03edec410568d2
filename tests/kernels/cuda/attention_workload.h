// Steps over a random KV4 cache on the device, their float64 reference, and timing, for the attention benchmark.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "common/base/float16.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/kv_page.h"

namespace nibble::cuda {

// Device memory with the lifetime of the object.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) { NIBBLE_CUDA_CHECK(cudaMalloc(&data_, count * sizeof(T) + 16)); }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    NIBBLE_CUDA_CHECK(cudaMemcpy(data_, from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() const { return data_; }
  size_t count() const { return count_; }
  void Fill(int byte) const { NIBBLE_CUDA_CHECK(cudaMemset(data_, byte, count_ * sizeof(T))); }
  std::vector<T> Get() const {
    std::vector<T> to(count_);
    NIBBLE_CUDA_CHECK(cudaMemcpy(to.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

struct HeadShape {
  int64_t q_heads = 64, kv_heads = 8, head_dim = 128;
  int64_t qkv_cols() const { return (q_heads + 2 * kv_heads) * head_dim; }
  int64_t out_cols() const { return q_heads * head_dim; }
  KvLayout layout() const { return {KvFormat::kKV4, kv_heads, head_dim}; }
};

// A cache of random codes and parameters.
class Cache {
 public:
  Cache(const HeadShape& shape, int64_t pages, uint32_t seed, float key_factor);
  const HeadShape& shape() const { return shape_; }
  KvPages pages() const { return {bytes_.data(), num_pages_, shape_.layout()}; }
  std::vector<uint8_t> Get() const { return bytes_.Get(); }
  // NaN and infinities in the parameters of `page` from `token` on.
  void Poison(int64_t page, int64_t token) const;

 private:
  HeadShape shape_;
  int64_t num_pages_;
  DeviceArray<uint8_t> bytes_;
};

// The rows of sequence `sequence`, at consecutive positions.
struct Part {
  int64_t position, rows;
};

// One step: tables, queries, output.
class Step {
 public:
  // `tables` holds one page table per part, `max_pages` entries each.
  Step(const Cache& cache, const std::vector<Part>& parts, const std::vector<int32_t>& tables, int64_t max_pages,
       uint32_t seed);
  AttentionArgs args() const;
  StepRows rows() const;
  int64_t row_count() const { return static_cast<int64_t>(positions_.count()); }
  const DeviceArray<uint16_t>& qkv() const { return qkv_; }
  const DeviceArray<uint16_t>& out() const { return out_; }

 private:
  const Cache& cache_;
  int64_t sequences_, max_pages_;
  DeviceArray<int32_t> positions_, row_sequence_, row_begin_, tables_;
  DeviceArray<uint16_t> qkv_, out_;
};

// Fills `count` bf16 values with about N(0, 1).
void FillNormal(uint16_t* to, int64_t count, uint32_t seed, float factor);

// Median of `repetitions` replays of one graph with a launch per element of `launches`, in microseconds per launch.
struct Timing {
  double us;        // per launch
  double spread;    // (third quartile − first) / median
  double sm_mhz;    // right after
};
Timing Time(cudaStream_t stream, const std::vector<std::function<void()>>& launches, int repetitions = 15);

}  // namespace nibble::cuda
