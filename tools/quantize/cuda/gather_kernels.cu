#include "tools/quantize/cuda/launch.cuh"
#include "tools/quantize/cuda/rounding_kernels.h"

namespace nibble::cuda {
namespace {

template <typename T>
__global__ void GatherKernel(GatherArgs args, T* to) {
  const int64_t k = args.k, i = blockIdx.x, place_i = args.reversed ? k - 1 - i : i;
  const int32_t a = args.channel[place_i];
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    const int32_t b = args.channel[args.reversed ? k - 1 - j : j];
    const int64_t row = args.symmetric ? min(a, b) : a, column = args.symmetric ? max(a, b) : b;
    double value = args.from[row * k + column];
    if (i == j) value += args.ridge;
    to[i * k + j] = static_cast<T>(value);
  }
}

__global__ void FeedbackKernel(const double* lower, int64_t k, float* feedback, float* column_weight) {
  const int64_t i = blockIdx.x;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    const double pivot = lower[(k - 1 - j) * (k + 1)];
    feedback[i * k + j] = i < j ? static_cast<float>(lower[(k - 1 - i) * k + (k - 1 - j)] / pivot) : 0.0f;
    if (i == j) column_weight[j] = static_cast<float>(pivot * pivot);
  }
}

__global__ void ReverseKernel(const double* from, int64_t k, float* to) {
  const int64_t i = blockIdx.x;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    to[i * k + j] = static_cast<float>(from[(k - 1 - i) * k + (k - 1 - j)]);
  }
}

__global__ void GatherColumnsKernel(const float* from, const int32_t* channel, int64_t k, float* to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) to[row + j] = from[row + channel[j]];
}

}  // namespace

void LaunchGather(cudaStream_t stream, const GatherArgs& args, double* to) {
  LaunchBlocks(stream, args.k, GatherKernel<double>, args, to);
}
void LaunchGather(cudaStream_t stream, const GatherArgs& args, float* to) {
  LaunchBlocks(stream, args.k, GatherKernel<float>, args, to);
}
void LaunchFeedback(cudaStream_t stream, const double* lower, int64_t k, float* feedback, float* column_weight) {
  LaunchBlocks(stream, k, FeedbackKernel, lower, k, feedback, column_weight);
}
void LaunchReverse(cudaStream_t stream, const double* from, int64_t k, float* to) {
  LaunchBlocks(stream, k, ReverseKernel, from, k, to);
}
void LaunchGatherColumns(cudaStream_t stream, const float* from, const int32_t* channel, int64_t n, int64_t k,
                         float* to) {
  LaunchBlocks(stream, n, GatherColumnsKernel, from, channel, k, to);
}

}  // namespace nibble::cuda
