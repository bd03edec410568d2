#include "kernels/cuda/rows/launch.cuh"
#include "kernels/cuda/rows/rows.h"

namespace nibble::cuda {

void SiluMulQuantize(const Device& device, const SiluMulQuantizeArgs& args, const RowPlan& plan) {
  const SiluSource source = {.gate_up = args.gate_up, .whole = WholeOctets(args.gate_up, args.gate_up.cols / 2)};
  LaunchRows(device, source, *args.coding, *args.out, plan);
}

}  // namespace nibble::cuda
