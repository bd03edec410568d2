#include "kernels/cuda/sampling/plan.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kDrawBlock = 64;            // ids that share sixteen counters of the random stream
constexpr int64_t kSegment = 8192;            // more blocks only while each has more than this to do
constexpr int kMaxCluster = 8;                // what every device with clusters can schedule
constexpr int64_t kStaticSharedBytes = 12 << 10;  // what the kernel declares, rounded up

int64_t SegmentOf(int64_t vocab, int cluster) {
  const int64_t blocks = (vocab + kDrawBlock - 1) / kDrawBlock;
  return (blocks + cluster - 1) / cluster * kDrawBlock;
}

}  // namespace

SamplePlan PlanSample(int64_t vocab, int capability, int64_t shared_bytes) {
  SamplePlan plan;
  if (capability >= 90) {
    while (plan.cluster < kMaxCluster && SegmentOf(vocab, plan.cluster) > kSegment) plan.cluster *= 2;
  }
  plan.segment = SegmentOf(vocab, plan.cluster);
  plan.shared_bytes = plan.segment * static_cast<int64_t>(sizeof(float));
  plan.in_shared = plan.shared_bytes + kStaticSharedBytes <= shared_bytes;
  if (!plan.in_shared) plan.shared_bytes = 0;
  return plan;
}

int64_t SampleScratchBytes(int64_t rows, int64_t vocab, int capability, int64_t shared_bytes) {
  const SamplePlan plan = PlanSample(vocab, capability, shared_bytes);
  return plan.in_shared ? 0 : rows * plan.cluster * plan.segment * static_cast<int64_t>(sizeof(float));
}

}  // namespace nibble::cuda
