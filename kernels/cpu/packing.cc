#include "kernels/cpu/packing.h"

#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace nibble {
namespace {

constexpr size_t kAlignment = 64;

int64_t TotalRows(auto parts) {
  int64_t n = 0;
  for (const auto& part : parts) n += part.n;
  return n;
}

// One output feature's 64 bytes of codes of a group into its lane of the tile.
void PackRow(const uint8_t* from, int64_t lane, uint8_t* to) {
  for (int64_t k = 0; k < kBlock; ++k) {
    const uint8_t code = (from[k / 2] >> (4 * (k % 2))) & 15;
    to[(k / 8) * 64 + 4 * lane + k % 4] |= static_cast<uint8_t>(code << (k % 8 < 4 ? 0 : 4));
  }
}

}  // namespace

absl::StatusOr<Buffer> AllocateHost(size_t bytes) {
  const size_t rounded = (bytes / kAlignment + 1) * kAlignment;
  void* data = rounded < bytes ? nullptr : std::aligned_alloc(kAlignment, rounded);
  if (data == nullptr) return absl::ResourceExhaustedError(absl::StrCat("no host memory for ", bytes, " bytes"));
  std::memset(data, 0, rounded);
  return Buffer(data, bytes, [](void* p) { std::free(p); });
}

absl::StatusOr<std::unique_ptr<Weight>> PackW4Tiles(std::span<const W4View> parts) {
  auto weight = std::make_unique<W4Weight>();
  weight->n = TotalRows(parts);
  weight->k = parts[0].k;
  weight->tiles = CeilDiv(weight->n, kTileN);
  weight->groups = weight->k / kBlock;
  const int64_t tile_groups = weight->tiles * weight->groups;
  NIBBLE_ASSIGN_OR_RETURN(weight->codes, AllocateHost(tile_groups * kTileGroupBytes));
  NIBBLE_ASSIGN_OR_RETURN(weight->group_scale, AllocateHost(tile_groups * kTileN));
  NIBBLE_ASSIGN_OR_RETURN(weight->group_min, AllocateHost(tile_groups * kTileN));
  NIBBLE_ASSIGN_OR_RETURN(weight->channel_scale, AllocateHost(weight->tiles * kTileN * sizeof(float)));
  weight->bytes = static_cast<int64_t>(weight->codes.bytes() + weight->group_scale.bytes() + weight->group_min.bytes() +
                                       weight->channel_scale.bytes());
  int64_t row = 0;
  for (const W4View& part : parts) {
    for (int64_t n = 0; n < part.n; ++n, ++row) {
      const int64_t lane = row % kTileN;
      weight->channel_scale.as<float>()[row] = part.channel_scale[n];
      for (int64_t g = 0; g < weight->groups; ++g) {
        const int64_t at = row / kTileN * weight->groups + g;
        PackRow(part.qweight + n * (part.k / 2) + g * (kBlock / 2), lane,
                weight->codes.as<uint8_t>() + at * kTileGroupBytes);
        weight->group_scale.as<uint8_t>()[at * kTileN + lane] = part.group_scale[n * weight->groups + g];
        weight->group_min.as<int8_t>()[at * kTileN + lane] = part.group_min[n * weight->groups + g];
      }
    }
  }
  return weight;
}

absl::StatusOr<std::unique_ptr<Weight>> PackDenseTiles(std::span<const DenseView> parts) {
  auto weight = std::make_unique<DenseWeight>();
  weight->n = TotalRows(parts);
  weight->k = parts[0].k;
  weight->tiles = CeilDiv(weight->n, kTileN);
  const int64_t pairs = CeilDiv(weight->k, 2);
  NIBBLE_ASSIGN_OR_RETURN(weight->data, AllocateHost(weight->tiles * pairs * kTileN * 2 * sizeof(BF16)));
  weight->bytes = static_cast<int64_t>(weight->data.bytes());
  int64_t row = 0;
  for (const DenseView& part : parts) {
    for (int64_t n = 0; n < part.n; ++n, ++row) {
      BF16* tile = weight->data.as<BF16>() + row / kTileN * pairs * kTileN * 2;
      for (int64_t k = 0; k < part.k; ++k) {
        tile[(k / 2 * kTileN + row % kTileN) * 2 + k % 2] = part.data[n * part.k + k];
      }
    }
  }
  return weight;
}

}  // namespace nibble
