#include "kernels/cuda/dense/plan.h"

namespace nibble::cuda {

DensePlan PlanDense(int64_t rows, int64_t k, DType in) {
  if (in != DType::kBF16 || k % kDenseStepK != 0) return kDenseChainPlan;
  for (const DensePlan& plan : kDensePlans) {
    if (rows <= plan.rows) return plan;
  }
  return kDensePlans[kNumDensePlans - 1];
}

}  // namespace nibble::cuda
