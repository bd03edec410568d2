// Which form of the W4Ax kernel computes a shape, and how its work is cut. Pure functions of the shape: no GPU needed,
// none asked. docs/kernels-gemm.md explains the prices and how to add a configuration.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/gemm_w4ax/config.h"
#include "kernels/cuda/gemm_w4ax/schedule.h"

namespace nibble::cuda {

struct GemmShape {
  int64_t n = 0;
  int64_t k = 0;
  int64_t rows = 0;  // T
  int multiprocessors = 132;
};

struct GemmPlan {
  int config = -1;  // index in kGemmConfigs
  WorkSplit split;

  const GemmConfig& Config() const { return kGemmConfigs[config]; }
  // Thread blocks of the launch.
  int Grid() const { return split.workers * Config().cluster; }
  // Memory for the sums of tiles whose K is cut between workers.
  int64_t PartialBytes() const;
};

// Every plan worth considering: each configuration that fits the rows, with each way to cut the work.
std::vector<GemmPlan> EnumerateGemmPlans(const GemmShape& shape);

// Expected microseconds of a launch in a stream of such launches.
double PriceGemmPlan(const GemmShape& shape, const GemmPlan& plan);

// The cheapest. rows >= 1.
GemmPlan PickGemmPlan(const GemmShape& shape);

// "c128 stream: 80 tiles of 128 x 128 on 66 clusters of 2".
std::string PrintGemmPlan(const GemmPlan& plan);

}  // namespace nibble::cuda
