#include "kernels/cuda/gemm_w4ax/launch.h"

#include <cuda.h>

#include <array>
#include <mutex>
#include <utility>

#include "kernels/cuda/gemm_w4ax/layout.h"

namespace nibble::cuda {
namespace {

template <int... kIndices>
const void* KernelOf(int index, std::integer_sequence<int, kIndices...>) {
  using Function = const void* (*)();
  static constexpr Function kFunctions[] = {&GemmKernelOf<kIndices>...};
  return kFunctions[index]();
}

// The kernel, allowed once per device to use its shared memory.
const void* PreparedKernel(const Device& device, int index) {
  constexpr int kMaxDevices = 64;
  static std::array<std::array<std::once_flag, kNumGemmConfigs>, kMaxDevices> prepared;
  NIBBLE_CHECK_LT(device.ordinal, kMaxDevices);
  const void* kernel = KernelOf(index, std::make_integer_sequence<int, kNumGemmConfigs>());
  std::call_once(prepared[device.ordinal][index], [&] {
    NIBBLE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kGemmConfigs[index].shared_bytes()));
  });
  return kernel;
}

// Boxes of `box_tokens` rows × 128 codes, swizzled as wgmma reads them; rows and columns past the end are zeros. The driver's
// function is found at run time, so that programs link and start without a driver.
CUtensorMap ActivationMap(const int8_t* codes, int64_t rows, int64_t k, int box_tokens) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    NIBBLE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    NIBBLE_CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[2] = {kDepthBlock, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(codes), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  NIBBLE_CHECK(result == CUDA_SUCCESS, "no tensor map for " + std::to_string(rows) + " x " + std::to_string(k) +
                                           " codes: " + std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace

void LaunchGemm(const Device& device, const GemmPlan& plan, const int8_t* codes, int64_t k, GemmParams params) {
  const GemmConfig& config = plan.Config();
  NIBBLE_CHECK_LE(plan.split.workers, kMaxGemmWorkers);
  NIBBLE_CHECK(config.streams() || plan.PartialBytes() == 0, PrintGemmPlan(plan));
  params.split = plan.split;
  params.depth_blocks = static_cast<int>(W4AxDepthBlocks(k));
  params.weights_once = plan.split.token_tiles == 1;
  CUtensorMap map = ActivationMap(codes, params.rows, k, BoxTokens(config.multicasts, plan.split.tile_tokens));

  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(plan.Grid()));
  launch.blockDim = dim3(128 * (kConsumers + 1));
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes());
  launch.stream = device.stream;
  launch.attrs = attributes;
  launch.numAttrs = config.cluster > 1 ? 2 : 1;
  void* arguments[] = {&map, &params};
  const cudaError_t launched = cudaLaunchKernelExC(&launch, PreparedKernel(device, plan.config), arguments);
  if (!IsSticky(launched)) NIBBLE_CUDA_CHECK(launched);
}

}  // namespace nibble::cuda
