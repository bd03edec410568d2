// Measuring operators on a GPU: CUDA graph replay, what the device can do at most, its clock, and cuBLASLt to compare
// with. For benchmarks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble::cuda {

struct DeviceFacts {
  std::string name;
  int capability = 0;      // 90
  int multiprocessors = 0;
  int64_t l2_bytes = 0;
  std::string driver, runtime;  // versions of CUDA that the driver supports and that this was built with
};

// Number types of the matrix products of cuBLASLt that linears are compared with.
enum class MatmulType : uint8_t { kBF16, kFP8, kInt8 };

struct Measured {
  double us = 0;       // of one launch, median of the replays
  double spread = 0;   // (slowest - fastest) / median of the replays
  double clock_mhz = 0;  // of the multiprocessors, mean over the last replay; 0 when not known
};

class Measure {
 public:
  virtual ~Measure() = default;

  virtual const DeviceFacts& facts() const = 0;

  // issue(0), issue(1), ... captured as one graph of `launches` and replayed; issue(0) runs once before, outside of it.
  // The graph's launches should name different memory, so that none finds its input in the L2 cache.
  virtual Measured Replay(int launches, int replays, const std::function<void(int)>& issue) = 0;

  // What plain reads of memory beyond the caches reach, bytes per second. Measured at the first call.
  virtual double ReadBandwidth() = 0;

  // y[rows, n] = x[rows, k] · w[n, k]^T by the fastest of cuBLASLt's proposals, on random data, weights rotated beyond
  // the L2 cache; output bf16, or int32 for int8. us is 0 when cuBLASLt has no algorithm.
  virtual Measured Matmul(MatmulType type, int64_t n, int64_t k, int64_t rows, int replays) = 0;

  // Most operations (2 per multiply-add) that the multiprocessors' matrix units do in a second at `clock_mhz`; 0 when
  // not known for this capability.
  double MatrixRate(MatmulType type, double clock_mhz) const;
};

// Measures on the stream of `ops`, which CreateCudaOps made and which outlives the result.
absl::StatusOr<std::unique_ptr<Measure>> CreateMeasure(Ops& ops);

}  // namespace nibble::cuda
