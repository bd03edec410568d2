#include "tests/kernels/cuda/cublas_baseline.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/gemm_w4ax_data.cuh"

namespace nibble::cuda::bench {
namespace {

constexpr int64_t kRotatedBytes = 300'000'000;
constexpr size_t kWorkspaceBytes = 64 << 20;
constexpr int kProposals = 6;

template <typename T>
__global__ void FillNormal(T* to, int64_t count, uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    to[i] = static_cast<T>(Normal(Hash(seed * 31 + i)));
  }
}

void Fill(void* to, int64_t count, bool fp8, uint64_t seed, cudaStream_t stream) {
  if (fp8) {
    FillNormal<<<2048, 256, 0, stream>>>(static_cast<__nv_fp8_e4m3*>(to), count, seed);
  } else {
    FillNormal<<<2048, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(to), count, seed);
  }
}

}  // namespace

double TimeGraph(cudaStream_t stream, int launches, int replays, const std::function<void(int)>& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  NIBBLE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i);
  NIBBLE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  NIBBLE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  NIBBLE_CUDA_CHECK(cudaEventCreate(&begin));
  NIBBLE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int r = 0; r < replays + 1; ++r) {
    NIBBLE_CUDA_CHECK(cudaEventRecord(begin, stream));
    NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    NIBBLE_CUDA_CHECK(cudaEventRecord(end, stream));
    NIBBLE_CUDA_CHECK(cudaEventSynchronize(end));
    float ms;
    NIBBLE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (r > 0) times.push_back(ms * 1e3 / launches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double TimeCublas(cudaStream_t stream, int64_t n, int64_t k, int64_t rows, bool fp8, int launches, int replays,
                  int pause_ms) {
  static cublasLtHandle_t handle = nullptr;
  static void* workspace = nullptr;
  if (handle == nullptr) {
    NIBBLE_CHECK(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    NIBBLE_CUDA_CHECK(cudaMalloc(&workspace, kWorkspaceBytes));
  }
  const int64_t bytes = n * k * (fp8 ? 1 : 2);
  std::vector<void*> weights(std::max<int64_t>(2, kRotatedBytes / bytes + 1));
  for (size_t i = 0; i < weights.size(); ++i) {
    NIBBLE_CUDA_CHECK(cudaMalloc(&weights[i], bytes));
    Fill(weights[i], n * k, fp8, i + 1, stream);
  }
  void *x, *y, *scales;
  NIBBLE_CUDA_CHECK(cudaMalloc(&x, rows * k * 2));
  NIBBLE_CUDA_CHECK(cudaMalloc(&y, rows * n * 2));
  NIBBLE_CUDA_CHECK(cudaMalloc(&scales, 1024));
  Fill(x, rows * k, fp8, 99, stream);
  const std::vector<float> scale(256, 0.01f);
  NIBBLE_CUDA_CHECK(cudaMemcpyAsync(scales, scale.data(), 1024, cudaMemcpyHostToDevice, stream));

  cublasLtMatmulDesc_t matmul;
  cublasLtMatmulDescCreate(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cublasLtMatmulDescSetAttribute(matmul, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose));
  if (fp8) {
    void *a = scales, *b = static_cast<uint8_t*>(scales) + 512;  // each 16-byte aligned, or every proposal is refused
    cublasLtMatmulDescSetAttribute(matmul, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a, sizeof(a));
    cublasLtMatmulDescSetAttribute(matmul, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &b, sizeof(b));
  }
  const cudaDataType_t type = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatrixLayoutCreate(&a, type, k, n, k);
  cublasLtMatrixLayoutCreate(&b, type, k, rows, k);
  cublasLtMatrixLayoutCreate(&c, CUDA_R_16BF, n, rows, n);
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulPreferenceCreate(&preference);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                                       sizeof(kWorkspaceBytes));
  cublasLtMatmulHeuristicResult_t proposals[kProposals];
  int found = 0;
  cublasLtMatmulAlgoGetHeuristic(handle, matmul, a, b, c, c, preference, kProposals, proposals, &found);
  double best = 0;
  for (int i = 0; i < found; ++i) {
    usleep(1000 * pause_ms);
    bool ran = true;
    const float one = 1, zero = 0;
    const double us = TimeGraph(stream, launches, replays, [&](int j) {
      ran = cublasLtMatmul(handle, matmul, &one, weights[j % weights.size()], a, x, b, &zero, y, c, y, c,
                           &proposals[i].algo, workspace, kWorkspaceBytes, stream) == CUBLAS_STATUS_SUCCESS &&
            ran;
    });
    if (ran && (best == 0 || us < best)) best = us;
  }
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(a);
  cublasLtMatrixLayoutDestroy(b);
  cublasLtMatrixLayoutDestroy(c);
  cublasLtMatmulDescDestroy(matmul);
  for (void* w : weights) cudaFree(w);
  cudaFree(x);
  cudaFree(y);
  cudaFree(scales);
  return best;
}

}  // namespace nibble::cuda::bench
