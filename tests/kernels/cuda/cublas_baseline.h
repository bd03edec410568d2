// The baselines: cuBLASLt in bf16 and fp8 (e4m3, one scale per tensor), best of its heuristics' proposals.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace nibble::cuda::bench {

// Runs launch(i) for i in 0..launches-1 as one graph a few times; median microseconds of a launch.
double TimeGraph(cudaStream_t stream, int launches, int replays, const std::function<void(int)>& launch);

// y[T, N] = x[T, K] · w[N, K]^T in bf16 output; microseconds, with weights rotated beyond the L2 cache. 0 when cuBLASLt
// has no algorithm.
double TimeCublas(cudaStream_t stream, int64_t n, int64_t k, int64_t rows, bool fp8, int launches, int replays, int pause_ms);

}  // namespace nibble::cuda::bench
