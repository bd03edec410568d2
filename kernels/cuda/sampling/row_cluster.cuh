// The blocks that hold one row of logits, and what they compute together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx/cluster.h"

namespace nibble::cuda {

inline constexpr int kSampleThreads = 512;
inline constexpr int kSampleWarps = kSampleThreads / 32;

// Static shared memory of the reductions. Two slots, used in turn: a block writes a slot again only after a barrier
// that its readers reached after they had read.
struct ReduceMemory {
  uint64_t warps[kSampleWarps];
  uint64_t slots[2];
};

struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

class RowCluster {
 public:
  __device__ RowCluster(ReduceMemory* memory, int rank, int size) : memory_(memory), rank_(rank), size_(size) {}

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Barrier of all threads of all blocks.
  __device__ void Sync() const {
#if __CUDA_ARCH__ >= 900
    ClusterSync();
#else
    __syncthreads();
#endif
  }

  // The object in the shared memory of block `rank`.
  template <typename T>
  __device__ const T* Of(const T* shared, int rank) const {
#if __CUDA_ARCH__ >= 900
    return static_cast<const T*>(__cluster_map_shared_rank(shared, rank));
#else
    return shared;
#endif
  }

  // The reduction of every thread's value, for every thread. The neutral element of both operations is 0.
  template <typename Operation>
  __device__ uint64_t Reduce(uint64_t value, Operation op) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = WarpReduce(value, op);
    if (lane == 0) memory_->warps[warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = WarpReduce(lane < kSampleWarps ? memory_->warps[lane] : 0, op);
      if (lane == 0) memory_->slots[turn_] = value;
    }
    Sync();
    value = 0;
    for (int rank = 0; rank < size_; ++rank) value = op(value, *Of(&memory_->slots[turn_], rank));
    turn_ ^= 1;
    return value;
  }

  template <typename Operation>
  static __device__ uint64_t WarpReduce(uint64_t value, Operation op) {
    for (int distance = 16; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(~0u, value, distance));
    return value;
  }

 private:
  ReduceMemory* memory_;
  int rank_;
  int size_;
  int turn_ = 0;
};

}  // namespace nibble::cuda
