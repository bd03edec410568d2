// Shared memory of the prefill kernel: the ring of unpacked pages, between the warpgroup that fills it and those that
// multiply, and what these keep.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/attention/segments.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kTileQueries = 64 * kMultipliers;
inline constexpr int kStages = 3;       // unpacked pages
inline constexpr int kAtomBytes = 128;  // of a row, in the layout that a 128-byte swizzle works on

// Place and phase in the ring through which a block's pages go one after the other.
class Turn {
 public:
  __device__ __forceinline__ explicit Turn(int turn) : turn_(turn) {}
  __device__ __forceinline__ int stage() const { return turn_ < kStages ? turn_ : turn_ - kStages; }
  __device__ __forceinline__ uint32_t parity() const { return turn_ < kStages ? 0 : 1; }
  __device__ __forceinline__ Turn After(int pages) const {
    return Turn(turn_ + pages < 2 * kStages ? turn_ + pages : turn_ + pages - 2 * kStages);
  }

 private:
  int turn_;  // of two rounds
};

// A page's K or V.
struct Barriers {
  uint64_t full, empty;
};

// What a warp needs of its 16 queries besides operands.
struct QueryRows {
  Tile tile;
  QueryFactors factors[16];
  int position[16];
};

// What is folded, in memory: per lane a float4 for each of two rows' state and one per eight channels.
template <int kHeadDim>
inline constexpr int kKeptFloat4 = (2 + kHeadDim / 8) * 32;

template <int kHeadDim>
struct PrefillShared {
  alignas(1024) uint8_t k[kStages][kTokensPerPage * kHeadDim * 2];  // tokens × channels, in atoms of 64 channels
  alignas(1024) uint8_t v[kStages][kHeadDim * kTokensPerPage * 2];  // channels × tokens
  alignas(1024) uint8_t q[kMultipliers][64 * kHeadDim * 2];
  // Per multiplying warp: what is folded over the streams of a chunk.
  float4 kept[kMultipliers * 4][kKeptFloat4<kHeadDim>];
  alignas(16) float2 k_parameters[kStages][kTokensPerPage];  // scale, zero
  alignas(16) float2 v_parameters[kStages][kTokensPerPage];
  alignas(8) PageStep steps[kStages];  // with K
  Tile tiles[kStages];                 // with K of a tile's first page; no rows: there are no more tiles
  QueryRows rows[kMultipliers * 4];
  Barriers k_barriers[kStages], v_barriers[kStages];
};

// 128-byte swizzle: 16-byte unit c of row r lies at unit c ^ (r % 8).
__device__ __forceinline__ uint32_t Swizzled(int row, int byte) {
  return row * kAtomBytes + ((byte / 16 ^ row % 8) * 16 | byte % 16);
}

}  // namespace nibble::cuda
