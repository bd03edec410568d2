#include "kernels/cuda/rows/launch.cuh"
#include "kernels/cuda/rows/rows.h"

namespace nibble::cuda {

void Quantize(const Device& device, const QuantizeArgs& args, const RowPlan& plan) {
  const PlainSource source = {.in = args.in, .whole = WholeOctets(args.in, args.in.cols)};
  LaunchRows(device, source, *args.coding, *args.out, plan);
}

}  // namespace nibble::cuda
