// Shared memory of the prefill kernel: the ring of unpacked pages, between the warpgroup that fills it and those that
// multiply, and what these keep.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/attention/segments.h"
#include "kernels/cuda/ptx/barrier.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kTileQueries = 64 * kMultipliers;
inline constexpr int kStages = 3;       // unpacked pages
inline constexpr int kPageWarps = 2;    // unpack a page together; the other warps take every other page
inline constexpr int kAtomBytes = 128;  // of a row, in the layout that a 128-byte swizzle works on

// Place and phase in the ring through which a block's pages go one after the other.
class Turn {
 public:
  __device__ __forceinline__ explicit Turn(int stage, uint32_t parity = 0) : stage_(stage), parity_(parity) {}
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  // At most a round later.
  __device__ __forceinline__ Turn After(int pages) const {
    const bool wraps = stage_ + pages >= kStages;
    return Turn(stage_ + pages - (wraps ? kStages : 0), parity_ ^ (wraps ? 1 : 0));
  }

 private:
  int stage_;
  uint32_t parity_;
};

// A page's K or V is full when an mbarrier says so. It is given back at a numbered barrier: those who multiply arrive,
// the warps that unpack the next page into it wait, without asking again and again.
struct Slot {
  int barrier;

  __device__ __forceinline__ void GiveBack() const { BarrierArrive<kThreads>(barrier); }
  __device__ __forceinline__ void AwaitEmpty() const { BarrierSync<kThreads>(barrier); }

 private:
  static constexpr int kThreads = kMultipliers * kWarpgroupThreads + kPageWarps * 32;
};
__device__ __forceinline__ Slot SlotOfK(int stage) { return {1 + stage}; }
__device__ __forceinline__ Slot SlotOfV(int stage) { return {1 + kStages + stage}; }

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
  // Per multiplying warp: a tile's queries on their way to registers; then what is folded over the streams of a chunk.
  float4 kept[kMultipliers * 4][kKeptFloat4<kHeadDim>];
  alignas(16) uint32_t k_parameters[kStages][kTokensPerPage];  // scale and zero, f16, at ParametersAt(token)
  alignas(16) uint32_t v_parameters[kStages][kTokensPerPage];
  // What the unpacking threads unpack next: pieces of K, of V, and parameters with K and with V.
  alignas(16) uint8_t copies[2 * 8 / kPageWarps + 2][kWarpgroupThreads][16];
  alignas(8) PageStep steps[kStages];  // with K
  Tile tiles[kStages];                 // with K of a tile's first page; no rows: there are no more tiles
  QueryRows rows[kMultipliers * 4];
  uint64_t k_full[kStages], v_full[kStages];
};

// Where a token's parameters lie: those of tokens 2t and 2t + 1 of two blocks of eight next to each other, since one
// thread needs them.
__device__ __forceinline__ int ParametersAt(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
}

// 128-byte swizzle: 16-byte unit c of row r lies at unit c ^ (r % 8).
__device__ __forceinline__ uint32_t Swizzled(int row, int byte) {
  return row * kAtomBytes + ((byte / 16 ^ row % 8) * 16 | byte % 16);
}

}  // namespace nibble::cuda
