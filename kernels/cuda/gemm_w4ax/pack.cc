#include <algorithm>
#include <vector>

#include "common/base/status.h"
#include "kernels/cuda/gemm_w4ax/gemm.h"
#include "kernels/cuda/gemm_w4ax/kernel.h"
#include "kernels/cuda/gemm_w4ax/layout.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kChunkBytes = int64_t{32} << 20;  // of checkpoint order on the device at a time
constexpr char kPurpose[] = "a W4Ax weight";

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> PackW4Ax(const Device& device, Staging& staging, std::span<const W4View> parts,
                                                 const PackW4AxOptions& options) {
  auto weight = std::make_unique<W4AxWeight>();
  weight->k = parts[0].k;
  weight->gate_up = options.interleave_gate_up;
  for (const W4View& part : parts) weight->n += part.n;
  if (weight->gate_up) {
    NIBBLE_CHECK(parts.size() == 2 && parts[0].n == parts[1].n && parts[0].n % 32 == 0,
                 "gate and up have the same number of rows, a multiple of 32");
  }
  const int64_t padded_n = W4AxRowBlocks(weight->n) * kRowBlock, groups = weight->k / kBlock;
  NIBBLE_ASSIGN_OR_RETURN(weight->blocks,
                          AllocateDevice(device, W4AxBytes(weight->n, weight->k) + kW4AxSlackBytes, kPurpose));
  NIBBLE_ASSIGN_OR_RETURN(weight->channel_scale, AllocateDevice(device, padded_n * 4, kPurpose));
  NIBBLE_ASSIGN_OR_RETURN(weight->arrivals,
                          AllocateDevice(device, kMaxGemmWorkers * kGemmArrivalsPerWorker * 4, kPurpose));
  weight->bytes = static_cast<int64_t>(weight->blocks.bytes() + weight->channel_scale.bytes() + weight->arrivals.bytes());

  const int64_t row_bytes = weight->k / 2 + 2 * groups;
  const int64_t chunk_rows = std::max<int64_t>(16, kChunkBytes / row_bytes / 16 * 16);  // of 16: aligned tensors
  NIBBLE_ASSIGN_OR_RETURN(Buffer chunk, AllocateDevice(device, chunk_rows * row_bytes, kPurpose));
  auto* qweight = chunk.as<uint8_t>();
  uint8_t* group_scale = qweight + chunk_rows * weight->k / 2;
  auto* group_min = reinterpret_cast<int8_t*>(group_scale + chunk_rows * groups);
  std::vector<float> channel_scale(padded_n);
  int64_t first = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const W4View& part = parts[p];
    for (int64_t begin = 0; begin < part.n; begin += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, part.n - begin);
      NIBBLE_CUDA_CHECK(staging.Upload(qweight, part.qweight + begin * (part.k / 2), rows * part.k / 2));
      NIBBLE_CUDA_CHECK(staging.Upload(group_scale, part.group_scale + begin * groups, rows * groups));
      NIBBLE_CUDA_CHECK(staging.Upload(group_min, part.group_min + begin * groups, rows * groups));
      LaunchW4AxRelayout(device.stream, {rows, part.k, qweight, group_scale, group_min, nullptr},
                         {.first = first + begin,
                          .interleave = weight->gate_up,
                          .part = static_cast<int64_t>(p),
                          .part_first = begin},
                         weight->blocks.as<uint8_t>());
    }
    for (int64_t n = 0; n < part.n; ++n) {
      channel_scale[PlacedRow({.first = first, .interleave = weight->gate_up, .part = static_cast<int64_t>(p)}, n)] =
          part.channel_scale[n];
    }
    first += part.n;
  }
  NIBBLE_CUDA_CHECK(staging.Upload(weight->channel_scale.data(), channel_scale.data(), channel_scale.size() * 4));
  NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));  // before the chunk is freed
  return weight;
}

}  // namespace nibble::cuda
