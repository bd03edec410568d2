// Starts the kernel that a plan names.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/rows/f32.cuh"
#include "kernels/cuda/rows/packed.cuh"
#include "kernels/cuda/rows/plan.h"

namespace nibble::cuda {

// Every octet of the rows is complete and 16-byte aligned.
inline bool WholeOctets(const Rows& rows, int64_t octets_of) {
  return octets_of % kOctet == 0 && rows.cols % kOctet == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

template <typename Source>
void LaunchRows(const Device& device, const Source& source, const InputCoding& coding, const LinearInput& out,
                const RowPlan& plan) {
  if (out.rows == 0) return;
  const dim3 grid(static_cast<unsigned>(out.rows)), block(static_cast<unsigned>(plan.threads));
  const int k = static_cast<int>(coding.k);
  const RowCoding row_coding = MakeRowCoding(coding, out);
  if (plan.packed) {
    NIBBLE_CHECK(source.whole, "rows of a quantized model are 16-byte aligned");
    AllowSharedMemory(CodePackedRows<Source>, plan.shared_bytes);
    Launch(device, CodePackedRows<Source>, grid, block, plan.shared_bytes, source, row_coding, k);
    return;
  }
  const auto kernel = coding.hadamard > 1 ? CodeF32Rows<Source, true> : CodeF32Rows<Source, false>;
  AllowSharedMemory(kernel, plan.shared_bytes);
  Launch(device, kernel, grid, block, plan.shared_bytes, source, row_coding, k,
         !coding.quantized && WholeOctets(out.dense, coding.k));
}

}  // namespace nibble::cuda
