#include "kernels/cuda/dense/plan.h"

namespace nibble::cuda {

DensePlan PlanDense(int64_t rows, int64_t k, DType in, int64_t shared_bytes) {
  if (in != DType::kBF16 || k % kDenseStepK != 0) return kDenseChainPlan;
  DensePlan picked = kDensePlans[0];  // the smallest that takes all rows, or the largest that fits
  for (const DensePlan& plan : kDensePlans) {
    if (plan.shared_bytes() > shared_bytes) break;
    picked = plan;
    if (rows <= plan.rows) break;
  }
  return picked;
}

}  // namespace nibble::cuda
