// The weight layouts of the CPU backend and how checkpoint tensors get there. A tile is sixteen output features, one
// per vector lane; rows past N in the last tile are zeros. docs/kernels.md draws both layouts.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/ops.h"

namespace nibble {

inline constexpr int64_t kTileN = 16;                            // output features of a tile
inline constexpr int64_t kTileGroupBytes = kTileN * kBlock / 2;  // 4-bit codes of one tile and one group

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Codes of (tile, group): 16 vectors of 64 bytes. In vector v, byte 4·j + i (output feature j of the tile) holds
// k = 8·v + i in its low nibble and k = 8·v + 4 + i in its high one, so that masking a vector leaves, lane by lane,
// the four consecutive codes that one byte-dot-product instruction takes.
struct W4Weight : Weight {
  int64_t tiles = 0;
  int64_t groups = 0;
  Buffer codes;          // u8 [tiles, groups, kTileGroupBytes]
  Buffer group_scale;    // u8 [tiles, groups, 16]
  Buffer group_min;      // i8 [tiles, groups, 16]
  Buffer channel_scale;  // f32 [tiles * 16]
};

// bf16 [tiles, ceil(K/2), 16, 2]: a 64-byte vector holds two consecutive k of sixteen outputs, even k in the low
// halves.
struct DenseWeight : Weight {
  int64_t tiles = 0;
  Buffer data;
};

// RESOURCE_EXHAUSTED when memory runs out. Arguments were checked in ops.cc.
absl::StatusOr<std::unique_ptr<Weight>> PackW4Tiles(std::span<const W4View> parts);
absl::StatusOr<std::unique_ptr<Weight>> PackDenseTiles(std::span<const DenseView> parts);

// Zeroed, 64-byte aligned host memory.
absl::StatusOr<Buffer> AllocateHost(size_t bytes);

}  // namespace nibble
