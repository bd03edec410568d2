// The unpacking warpgroup of the prefill kernel: codes of a page become f16 operands in swizzled shared memory.
#pragma once

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill_shared.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/mbarrier.h"

namespace nibble::cuda {

inline constexpr int kPageWarps = 2;  // unpack a page together; the other warps take every other page
static_assert(kPageWarps * 32 == kTokensPerPage, "a thread takes a token's parameters");

template <int kWords>
__device__ __forceinline__ void LoadWords(const uint8_t* from, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 4) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
    words[0] = v.x, words[1] = v.y;
  }
}

// The part of a page that one thread unpacks. Lane 4r + t of a warp takes of K token r of a block of eight and a quarter
// of the channels, of V the tokens 2t, 2t + 1 of block r and an eighth of the channels: in both, a word's masked halves
// are an element of row r of a matrix of 8 x 8.
template <int kHeadDim>
struct RawPage {
  static constexpr int kWords = kHeadDim / 32, kPieces = 8 / kPageWarps;

  uint32_t k[kPieces][kWords], v[kPieces][kWords];

  static __device__ __forceinline__ int Piece(int n) { return threadIdx.x / 32 % kPageWarps * kPieces + n; }
  static __device__ __forceinline__ int Token() { return threadIdx.x % kTokensPerPage; }

  __device__ __forceinline__ void LoadK(const uint8_t* head) {
    const uint8_t* from = head + (Piece(0) * 32 + threadIdx.x % 32) * 4 * kWords;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) LoadWords<kWords>(from + n * 128 * kWords, k[n]);
  }
  __device__ __forceinline__ void LoadV(const uint8_t* head) {
    const int lane = threadIdx.x % 32;
    const uint8_t* from = head + 32 * kHeadDim + lane / 4 * 4 * kHeadDim + (Piece(0) * 4 + lane % 4) * 4 * kWords;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) LoadWords<kWords>(from + n * 16 * kWords, v[n]);
  }
  __device__ __forceinline__ uint2 LoadParameters(const uint8_t* head) const {
    return __ldcg(reinterpret_cast<const uint2*>(head + KvParameters(kHeadDim, Token())));
  }

  // A word gives four matrices: of K the eight channels of a lane of the decode kernel's operands, of V four channels.
  // Lane 8m + r names row r of matrix m, 16 bytes: of K token r at unit 4w + m of its row, of V channel 4w + m at unit r.
  // Either way the swizzle puts it at unit (m ^ r) ^ 4 (w % 2). Parameters of a token that no query sees may be anything
  // and become zero.
  __device__ __forceinline__ void UnpackK(uint32_t stage, uint32_t parameters, float2* k_parameters, bool seen) const {
    const uint32_t first = stage + (8 * Piece(0) + Row()) * kAtomBytes;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t atom = first + w / 2 * (kTokensPerPage * kAtomBytes);
        StoreWord(atom + Unit(w) + n * (8 * kAtomBytes), k[n][w]);
      }
    }
    k_parameters[Token()] = UnpackF16(seen ? parameters : 0);
  }
  __device__ __forceinline__ void UnpackV(uint32_t stage, uint32_t parameters, float2* v_parameters, bool seen) const {
    const uint32_t first = stage + (4 * kWords * Piece(0) + Matrix()) * kAtomBytes;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) StoreWord(first + Unit(w) + 4 * (n * kWords + w) * kAtomBytes, v[n][w]);
    }
    v_parameters[Token()] = UnpackF16(seen ? parameters : 0);
  }
  static __device__ __forceinline__ int Matrix() { return threadIdx.x % 32 / 8; }
  static __device__ __forceinline__ int Row() { return threadIdx.x % 8; }
  static __device__ __forceinline__ uint32_t Unit(int w) { return (Matrix() ^ Row() ^ w % 2 * 4) * 16; }
  static __device__ __forceinline__ void StoreWord(uint32_t row_address, uint32_t word) {
    const uint32_t upper = word >> 8;
    StoreMatrices(row_address, word & kLowNibbles, word & kHighNibbles, upper & kLowNibbles, upper & kHighNibbles);
  }
};

template <int kHeadDim>
__device__ __forceinline__ void UnpackPages(const PrefillParameters& p, PrefillShared<kHeadDim>* shared) {
  constexpr int kHeadBytes = 64 * kHeadDim + 512, kTeams = kWarpgroupThreads / 32 / kPageWarps;
  const int team = threadIdx.x / 32 / kPageWarps;
  const bool writes_step = threadIdx.x % (kPageWarps * 32) == 0;
  int place = team;           // among the tile's pages, of the team's next one
  Turn turn(kStages + team);  // waits for the phase before the first: an empty ring counts as released
  for (int round = 0;; ++round) {
    const Tile tile = FindTile(p, TileIndex(round));
    if (tile.rows == 0) break;
    // Only this warpgroup traps: code that others have too, and be it a trap, would take their registers from them.
    CheckedPosition(p.step, tile.row);
    const int32_t* table = p.step.page_tables + static_cast<int64_t>(tile.sequence) * p.step.max_pages;
    const int pages = tile.pages();
    const auto head_of = [&](const PagePlace& at) {
      const int64_t page = CheckedPage(p.step, __ldg(table + at.page));
      return p.pages + (page * p.kv_heads + tile.kv_head) * kHeadBytes;
    };
    RawPage<kHeadDim> raw;
    uint2 parameters;
    PageStep step;
    if (place < pages) {
      const PagePlace at(place, pages);
      const uint8_t* head = head_of(at);
      step = StepAt(place, at, tile, p.group);
      raw.LoadK(head);
      raw.LoadV(head);
      parameters = raw.LoadParameters(head);
    }
    while (place < pages) {
      const bool seen = step.first_token + RawPage<kHeadDim>::Token() < tile.position + tile.rows;
      Barriers& of_k = shared->k_barriers[turn.stage()];
      Barriers& of_v = shared->v_barriers[turn.stage()];
      MbarrierWait(SharedAddress(&of_k.empty), turn.parity());
      raw.UnpackK(SharedAddress(shared->k[turn.stage()]), parameters.x, shared->k_parameters[turn.stage()], seen);
      if (writes_step) shared->steps[turn.stage()] = step;
      if (writes_step && step.IsFirst()) shared->tiles[turn.stage()] = tile;
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&of_k.full));
      // The next page comes while the others multiply this one.
      place += kTeams;
      const bool more = place < pages;
      const uint8_t* head = nullptr;
      if (more) {
        const PagePlace at(place, pages);
        head = head_of(at);
        step = StepAt(place, at, tile, p.group);
        raw.LoadK(head);
      }
      MbarrierWait(SharedAddress(&of_v.empty), turn.parity());
      raw.UnpackV(SharedAddress(shared->v[turn.stage()]), parameters.y, shared->v_parameters[turn.stage()], seen);
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&of_v.full));
      turn = turn.After(kTeams);
      if (more) {
        raw.LoadV(head);
        parameters = raw.LoadParameters(head);
      }
    }
    place -= pages;
  }
  if (place == 0) {  // the end, in place of a tile's first page
    Barriers& of_k = shared->k_barriers[turn.stage()];
    MbarrierWait(SharedAddress(&of_k.empty), turn.parity());
    if (writes_step) shared->tiles[turn.stage()].rows = 0;
    MbarrierArrive(SharedAddress(&of_k.full));
  }
}

}  // namespace nibble::cuda
