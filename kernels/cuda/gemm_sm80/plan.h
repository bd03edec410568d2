// Which form of the kernel computes a shape, and how its work is cut. Pure functions of the shape: no GPU needed, none
// asked. The prices come from data sheets, not from measurements (docs/kernels-gemm-sm80.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/gemm_sm80/config.h"
#include "kernels/cuda/gemm_sm80/schedule.h"

namespace nibble::cuda::sm80 {

struct GemmShape {
  int64_t n = 0;
  int64_t rows = 0;              // T
  int64_t four_bit_blocks = 0;   // of 128 input channels
  int64_t eight_bit_blocks = 0;
  int multiprocessors = 108;

  int64_t k() const { return (four_bit_blocks + eight_bit_blocks) * kDepthBlock; }
};

struct GemmPlan {
  int config = -1;  // index in kGemmConfigs
  WorkSplit split;

  const GemmConfig& Config() const { return kGemmConfigs[config]; }
  int64_t PaddedTokens() const { return int64_t{split.token_tiles} * Config().tokens; }
  // Memory for the sums of tiles whose K is cut between thread blocks.
  int64_t PartialBytes() const;
};

// Every plan worth considering: each configuration that fits the rows, with whole tiles only, and with the last wave
// decomposed.
std::vector<GemmPlan> EnumerateGemmPlans(const GemmShape& shape);

// Expected clock cycles of a launch.
double PriceGemmPlan(const GemmPlan& plan);

// The cheapest. rows >= 1.
GemmPlan PickGemmPlan(const GemmShape& shape);

// "t128 tail: 80 tiles of 128 x 128, 56 4-bit and 8 8-bit blocks at 1:2, 0 whole, on 108 blocks".
std::string PrintGemmPlan(const GemmPlan& plan);

}  // namespace nibble::cuda::sm80
