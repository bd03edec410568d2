// The unpacking warpgroup of the prefill kernel: codes of a page become f16 operands in swizzled shared memory.
#pragma once

#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill_shared.cuh"
#include "kernels/cuda/attention/prefill_tile.cuh"
#include "kernels/cuda/ptx/copy_async.h"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/mbarrier.h"

namespace nibble::cuda {

static_assert(kPageWarps * 32 == kTokensPerPage, "a thread takes a token's parameters");

// The part of a page that one thread unpacks. Lane 4r + t of a warp takes of K token r of a block of eight and a quarter
// of the channels, of V the tokens 2t, 2t + 1 of block r and an eighth of the channels: in both, a word's masked halves
// are an element of row r of a matrix of 8 x 8.
template <int kHeadDim>
struct RawPage {
  static constexpr int kWords = kHeadDim / 32, kPieces = 8 / kPageWarps;

  // Where in shared memory the thread's part comes to, which no other thread touches: registers are for those who
  // multiply. Past the first-level cache, in which it might be older, come 16 bytes at a time: a piece of codes if
  // D = 128, and a neighbour's with it if D = 64; a token's parameters and its neighbour's.
  uint32_t shared;

  __device__ __forceinline__ uint32_t At(int n) const { return shared + n * (kWarpgroupThreads * 16); }
  __device__ __forceinline__ void Copy(int n, const uint8_t* from) const { CopyAsync16(At(n), from, true); }

  static __device__ __forceinline__ int Piece(int n) { return threadIdx.x / 32 % kPageWarps * kPieces + n; }
  static __device__ __forceinline__ int Token() { return threadIdx.x % kTokensPerPage; }
  static __device__ __forceinline__ int InCopy() { return kWords == 4 ? 0 : threadIdx.x % 2 * 8; }

  __device__ __forceinline__ void LoadK(const uint8_t* head) const {
    const uint8_t* from = head + (Piece(0) * 32 + threadIdx.x % 32) * 4 * kWords - InCopy();
#pragma unroll
    for (int n = 0; n < kPieces; ++n) Copy(n, from + n * 128 * kWords);
    Copy(2 * kPieces, head + KvParameters(kHeadDim, Token() & ~1));
  }
  __device__ __forceinline__ void LoadV(const uint8_t* head) const {
    const int lane = threadIdx.x % 32;
    const uint8_t* from =
        head + 32 * kHeadDim + lane / 4 * 4 * kHeadDim + (Piece(0) * 4 + lane % 4) * 4 * kWords - InCopy();
#pragma unroll
    for (int n = 0; n < kPieces; ++n) Copy(kPieces + n, from + n * 16 * kWords);
    Copy(2 * kPieces + 1, head + KvParameters(kHeadDim, Token() & ~1));
  }

  // A word gives four matrices: of K the eight channels of a lane of the decode kernel's operands, of V four channels.
  // Lane 8m + r names row r of matrix m, 16 bytes: of K token r at unit 4w + m of its row, of V channel 4w + m at unit r.
  // Either way the swizzle puts it at unit (m ^ r) ^ 4 (w % 2). Parameters of a token that no query sees may be anything
  // and become zero.
  __device__ __forceinline__ void UnpackK(uint32_t stage, uint32_t* k_parameters, bool seen) const {
    const uint32_t first = stage + (8 * Piece(0) + Row()) * kAtomBytes;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t words[kWords];
      LoadShared(At(n) + InCopy(), words);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t atom = first + w / 2 * (kTokensPerPage * kAtomBytes);
        StoreWord(atom + Unit(w) + n * (8 * kAtomBytes), words[w]);
      }
    }
    k_parameters[ParametersAt(Token())] = seen ? LoadShared32(At(2 * kPieces) + Token() % 2 * 8) : 0;
  }
  __device__ __forceinline__ void UnpackV(uint32_t stage, uint32_t* v_parameters, bool seen) const {
    const uint32_t first = stage + (4 * kWords * Piece(0) + Matrix()) * kAtomBytes;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t words[kWords];
      LoadShared(At(kPieces + n) + InCopy(), words);
#pragma unroll
      for (int w = 0; w < kWords; ++w) StoreWord(first + Unit(w) + 4 * (n * kWords + w) * kAtomBytes, words[w]);
    }
    v_parameters[ParametersAt(Token())] = seen ? LoadShared32(At(2 * kPieces + 1) + Token() % 2 * 8 + 4) : 0;
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
  int place = team;  // among the tile's pages, of the team's next one
  Turn turn(team);   // the page's place in the ring
  for (int round = 0;; ++round) {
    const Tile tile = FindTile(p, TileIndex(round));
    if (tile.rows == 0) break;
    // Only this warpgroup traps: code that others have too, and be it a trap, would take their registers from them.
    CheckedPosition(p.step, tile.row);
    const int pages = tile.pages();
    const auto page_at = [&](const PagePlace& at) {
      return CheckedPage(p.step, __ldg(p.step.page_tables + int64_t{tile.sequence} * p.step.max_pages + at.page));
    };
    const auto head_of = [&](int page) { return p.pages + (int64_t{page} * p.kv_heads + tile.kv_head) * kHeadBytes; };
    const RawPage<kHeadDim> raw = {SharedAddress(shared->copies[0][threadIdx.x])};
    PageStep step;
    if (place < pages) {
      const PagePlace at(place, pages);
      const int page = page_at(at);
      step = StepAt(place, at, tile, p.group);
      raw.LoadK(head_of(page));
      CopyAsyncCommit();
      raw.LoadV(head_of(page));
      CopyAsyncCommit();
    }
    while (place < pages) {
      const bool seen = step.first_token + RawPage<kHeadDim>::Token() < tile.position + tile.rows;
      SlotOfK(turn.stage()).AwaitEmpty();
      CopyAsyncWait<1>();
      raw.UnpackK(SharedAddress(shared->k[turn.stage()]), shared->k_parameters[turn.stage()], seen);
      if (writes_step) shared->steps[turn.stage()] = step;
      if (writes_step && step.IsFirst()) shared->tiles[turn.stage()] = tile;
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&shared->k_full[turn.stage()]));
      // The next page comes while the others multiply this one.
      place += kTeams;
      const bool more = place < pages;
      int page = 0;
      if (more) {
        const PagePlace at(place, pages);
        page = page_at(at);
        step = StepAt(place, at, tile, p.group);
        raw.LoadK(head_of(page));
      }
      CopyAsyncCommit();  // as many groups in any case
      SlotOfV(turn.stage()).AwaitEmpty();
      CopyAsyncWait<1>();
      raw.UnpackV(SharedAddress(shared->v[turn.stage()]), shared->v_parameters[turn.stage()], seen);
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&shared->v_full[turn.stage()]));
      turn = turn.After(kTeams);
      if (more) raw.LoadV(head_of(page));
      CopyAsyncCommit();
    }
    place -= pages;
  }
  if (place == 0) {  // the end, in place of a tile's first page
    SlotOfK(turn.stage()).AwaitEmpty();
    if (writes_step) shared->tiles[turn.stage()].rows = 0;
    MbarrierArrive(SharedAddress(&shared->k_full[turn.stage()]));
  }
}

}  // namespace nibble::cuda
