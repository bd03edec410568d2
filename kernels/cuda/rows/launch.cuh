// Starts the kernel that a plan names.
#pragma once

#include <cstdint>

#include "kernels/cuda/cluster_launch.h"
#include "kernels/cuda/rows/f32.cuh"
#include "kernels/cuda/rows/packed.cuh"
#include "kernels/cuda/rows/plan.h"
#include "kernels/cuda/rows/slice.cuh"

namespace nibble::cuda {

// Every octet of the rows is complete and 16-byte aligned.
inline bool WholeOctets(const Rows& rows, int64_t octets_of) {
  return octets_of % kOctet == 0 && rows.cols % kOctet == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

template <typename Source>
void LaunchUnits(const Device& device, const Source& source, const RowCoding& coding, int64_t rows, int k,
                 const RowPlan& plan) {
  const dim3 grid(static_cast<unsigned>(rows * plan.slices)), block(static_cast<unsigned>(plan.threads));
  const auto launch = [&](auto kernel) { Launch(device, kernel, grid, block, plan.shared_bytes, source, coding, k); };
  if (plan.slices > 1) {
    LaunchClusters(device, plan.slices, CodeClusterSlices<Source, 2>, grid, block, plan.shared_bytes, source, coding,
                   k);
    return;
  }
  if constexpr (Source::kNorm) {
    launch(plan.octets == 4 ? CodeRowSlices<Source, 4> : CodeRowSlices<Source, 2>);
  } else if (plan.kind == RowPlan::Kind::kPacked) {
    AllowSharedMemory(CodePackedRows<Source>, plan.shared_bytes);
    launch(CodePackedRows<Source>);
  } else {
    launch(CodeRowSlices<Source, 2>);
  }
}

template <typename Source>
void LaunchRows(const Device& device, const Source& source, const InputCoding& coding, const LinearInput& out,
                const RowPlan& plan) {
  if (out.rows == 0) return;
  const int k = static_cast<int>(coding.k);
  const RowCoding row_coding = MakeRowCoding(coding, out);
  if (plan.kind != RowPlan::Kind::kF32) {
    NIBBLE_CHECK(source.whole, "rows of a quantized model are 16-byte aligned");
    if constexpr (!Source::kNorm) {
      if (coding.hadamard > 1) {
        const WithHadamard<Source> transformed = {source, static_cast<int>(coding.hadamard)};
        return LaunchUnits(device, transformed, row_coding, out.rows, k, plan);
      }
    }
    return LaunchUnits(device, source, row_coding, out.rows, k, plan);
  }
  const auto kernel = coding.hadamard > 1 ? CodeF32Rows<Source, true> : CodeF32Rows<Source, false>;
  AllowSharedMemory(kernel, plan.shared_bytes);
  Launch(device, kernel, dim3(static_cast<unsigned>(out.rows)), dim3(static_cast<unsigned>(plan.threads)),
         plan.shared_bytes, source, row_coding, k, !coding.quantized && WholeOctets(out.dense, coding.k));
}

}  // namespace nibble::cuda
