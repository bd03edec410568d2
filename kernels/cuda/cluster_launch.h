// Launching thread block clusters.
#pragma once

#include "kernels/cuda/device.h"

namespace nibble::cuda {

// As Launch (device.h), with `cluster` consecutive blocks to a cluster; before sm_90 without.
template <typename... Parameters, typename... Arguments>
void LaunchClusters(const Device& device, int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    int64_t shared_bytes, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = device.stream;
  config.attrs = attributes;
  config.numAttrs = device.capability >= 90 ? 2 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (!IsSticky(launched)) NIBBLE_CUDA_CHECK(launched);
}

}  // namespace nibble::cuda
