#include <algorithm>

#include "kernels/cuda/rows/launch.cuh"
#include "kernels/cuda/rows/rows.h"

namespace nibble::cuda {
namespace {

// residual += delta, one thread per octet of a row.
__global__ void AddRows(const NormSource source) {
  GridDependencyLaunch();
  GridDependencyWait();
  const int begin = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kOctet;
  if (begin >= source.residual.cols) return;
  float x[kOctet];
  source.Load(blockIdx.y, begin, x);
}

}  // namespace

void AddNormQuantize(const Device& device, const AddNormQuantizeArgs& args, const RowPlan& plan) {
  NormSource source = {.residual = args.residual,
                       .delta = args.delta == nullptr ? Rows{} : *args.delta,
                       .weight = reinterpret_cast<const uint16_t*>(args.weight),
                       .row_index = args.row_index,
                       .eps = args.eps,
                       .whole = WholeOctets(args.residual, args.residual.cols) &&
                                (args.delta == nullptr || WholeOctets(*args.delta, args.residual.cols)) &&
                                reinterpret_cast<uintptr_t>(args.weight) % 16 == 0};
  const bool mixed = args.delta != nullptr && args.delta->dtype != args.residual.dtype;
  if (args.delta != nullptr && (args.row_index != nullptr || mixed)) {
    // Every row is added to before any is read by an index; and packed rows are of one type.
    constexpr unsigned kThreads = 128;
    const unsigned octets = static_cast<unsigned>((args.residual.cols + kOctet - 1) / kOctet);
    constexpr int64_t kMostRows = 65535;  // of a grid's second dimension
    for (int64_t begin = 0; begin < args.residual.rows; begin += kMostRows) {
      NormSource part = source;
      part.row_index = nullptr;
      part.residual.rows = std::min(kMostRows, args.residual.rows - begin);
      part.residual.data = RowPointer(args.residual, begin);
      part.delta.data = RowPointer(*args.delta, begin);
      Launch(device, AddRows, dim3((octets + kThreads - 1) / kThreads, static_cast<unsigned>(part.residual.rows)),
             dim3(kThreads), 0, part);
    }
    source.delta.data = nullptr;
  }
  LaunchRows(device, source, *args.coding, *args.out, plan);
}

}  // namespace nibble::cuda
