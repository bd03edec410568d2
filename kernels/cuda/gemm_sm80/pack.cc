#include <algorithm>
#include <vector>

#include "common/base/status.h"
#include "kernels/cuda/gemm_sm80/gemm.h"
#include "kernels/cuda/gemm_sm80/layout.h"

namespace nibble::cuda::sm80 {
namespace {

constexpr int64_t kChunkBytes = int64_t{32} << 20;  // of checkpoint order on the device at a time
constexpr char kPurpose[] = "a W4Ax weight";

// Place of each block in the kernel's order: 4-bit blocks, then 8-bit ones.
std::vector<int32_t> StepsOf(const uint8_t* block_bits, int64_t blocks, int64_t* four_bit_blocks) {
  auto is_four_bit = [&](int64_t b) { return block_bits != nullptr && block_bits[b] == 4; };
  std::vector<int32_t> steps(blocks);
  int32_t next = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (is_four_bit(b)) steps[b] = next++;
  }
  *four_bit_blocks = next;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!is_four_bit(b)) steps[b] = next++;
  }
  return steps;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> PackW4Ax(const Device& device, Staging& staging, std::span<const W4View> parts) {
  auto weight = std::make_unique<W4AxWeight>();
  weight->k = parts[0].k;
  for (const W4View& part : parts) weight->n += part.n;
  const int64_t padded_n = RowTiles(weight->n) * kTileRows, blocks = weight->k / kBlock;
  const std::vector<int32_t> steps = StepsOf(parts[0].block_bits, blocks, &weight->four_bit_blocks);
  const int64_t depth = MinimaDepth(weight->four_bit_blocks);
  NIBBLE_ASSIGN_OR_RETURN(weight->blocks,
                          AllocateDevice(device, padded_n / kTileRows * blocks * kWeightBlockBytes, kPurpose));
  NIBBLE_ASSIGN_OR_RETURN(weight->minima, AllocateDevice(device, std::max<int64_t>(padded_n * depth, 1), kPurpose));
  NIBBLE_ASSIGN_OR_RETURN(weight->steps, AllocateDevice(device, blocks * 4, kPurpose));
  NIBBLE_ASSIGN_OR_RETURN(weight->channel_scale, AllocateDevice(device, padded_n * 4, kPurpose));
  weight->bytes = static_cast<int64_t>(weight->blocks.bytes() + weight->minima.bytes() + weight->steps.bytes() +
                                       weight->channel_scale.bytes());
  NIBBLE_CUDA_CHECK(staging.Upload(weight->steps.data(), steps.data(), steps.size() * 4));

  const int64_t row_bytes = weight->k / 2 + 2 * blocks;
  const int64_t chunk_rows = std::max<int64_t>(16, kChunkBytes / row_bytes / 16 * 16);  // of 16: aligned tensors
  NIBBLE_ASSIGN_OR_RETURN(Buffer chunk, AllocateDevice(device, chunk_rows * row_bytes, kPurpose));
  auto* qweight = chunk.as<uint8_t>();
  uint8_t* group_scale = qweight + chunk_rows * weight->k / 2;
  auto* group_min = reinterpret_cast<int8_t*>(group_scale + chunk_rows * blocks);
  std::vector<float> channel_scale;
  int64_t first = 0;
  for (const W4View& part : parts) {
    for (int64_t begin = 0; begin < part.n; begin += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, part.n - begin);
      NIBBLE_CUDA_CHECK(staging.Upload(qweight, part.qweight + begin * (part.k / 2), rows * part.k / 2));
      NIBBLE_CUDA_CHECK(staging.Upload(group_scale, part.group_scale + begin * blocks, rows * blocks));
      NIBBLE_CUDA_CHECK(staging.Upload(group_min, part.group_min + begin * blocks, rows * blocks));
      LaunchWeightLayout(device.stream,
                         {.n = rows,
                          .k = part.k,
                          .qweight = qweight,
                          .group_scale = group_scale,
                          .group_min = group_min},
                         first + begin,
                         {.blocks = weight->blocks.as<uint8_t>(),
                          .minima = weight->minima.as<int8_t>(),
                          .steps = weight->steps.as<int32_t>(),
                          .four_bit_blocks = weight->four_bit_blocks});
    }
    channel_scale.insert(channel_scale.end(), part.channel_scale, part.channel_scale + part.n);
    first += part.n;
  }
  NIBBLE_CUDA_CHECK(staging.Upload(weight->channel_scale.data(), channel_scale.data(), channel_scale.size() * 4));
  NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));  // before the chunk is freed
  return weight;
}

}  // namespace nibble::cuda::sm80
