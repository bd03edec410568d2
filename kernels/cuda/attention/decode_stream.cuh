// A warp's stream of pages: copies pages into its ring of slots, kSlots ahead of the arithmetic and over the ends of
// chunks and heads, attends them one after the other, and leaves what a chunk's stream came to for the fold.
//
// Tensor-core roles: tokens are rows of A and the eight query heads columns of B in K · Q; channels are rows of A and
// heads columns of B in V · P. So codes go from shared memory to A registers with one AND per register.
#pragma once

#include "kernels/cuda/attention/decode_shared.cuh"
#include "kernels/cuda/ptx/bulk_copy.h"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {

// The copying side of a stream: the same chunks as the arithmetic, up to kSlots pages earlier.
template <int kWords>
class PageCopier {
 public:
  __device__ __forceinline__ PageCopier(const DecodeShared<kWords>& shared, uint32_t ring, uint32_t barriers)
      : shared_(shared), ring_(ring), barriers_(barriers), policy_(L2EvictFirst()) {
    Open();
  }

  // Starts the copy of the stream's next page into the next slot. False when there is none, or none yet: while chunk n
  // is attended, chunk n + 1 is the last that may be asked for, since the walk goes on only as chunks are folded.
  // Before the kernels in front have finished (`all` false), only the first chunk's pages that no row of this step
  // writes.
  __device__ __forceinline__ bool Start(int n, bool all) {
    while (page_ >= pages_) {
      if (pages_ == 0 || chunk_ > n || !all) return false;
      ++chunk_;
      Open();
    }
    const ChunkWork& work = shared_.works[chunk_ % kWorks];
    if (!all && page_ >= work.fresh_page) return false;
    if (threadIdx.x % 32 == 0) {
      MbarrierArriveExpect(barriers_ + 8 * slot_, Sizes<kWords>::kHeadBytes);
      BulkCopy(ring_ + slot_ * Sizes<kWords>::kHeadBytes, work.pages[page_], Sizes<kWords>::kHeadBytes,
               barriers_ + 8 * slot_, policy_);
    }
    page_ += kStreams;
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
    return true;
  }

 private:
  __device__ __forceinline__ void Open() {
    WaitTurn<kWorks>(shared_.work_full, chunk_);
    pages_ = shared_.works[chunk_ % kWorks].page_count;
    page_ = threadIdx.x / 32;
  }

  const DecodeShared<kWords>& shared_;
  const uint32_t ring_, barriers_;
  const uint64_t policy_;
  int chunk_ = 0, page_ = 0, pages_ = 0, slot_ = 0;
};

// A warp's stream: lane 4g + t holds the softmax of heads 2t and 2t + 1 over tokens g, g + 8, ..., and accumulators of
// channels 4·words·g + 4w + {0, 1, 2, 3}: accumulators[2w][0, 2], [2w + 1][0, 2] of head 2t, [1, 3] of head 2t + 1.
template <int kWords>
struct Stream {
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  float zero[2] = {0, 0};
  float accumulators[2 * kWords][4] = {};
};

// dots[i]: tokens 16i + g (first two) and 16i + 8 + g of heads 2t, 2t + 1.
template <int kWords>
__device__ __forceinline__ void Dots(uint32_t page, uint32_t query, float (&dots)[4][4]) {
  const int lane = threadIdx.x % 32;
  uint4 q[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) q[w] = LoadShared128(query + (w * 32 + lane) * 16);
  uint32_t low[4][kWords], high[4][kWords];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    LoadShared(page + (2 * i * 32 + lane) * 4 * kWords, low[i]);
    LoadShared(page + ((2 * i + 1) * 32 + lane) * 4 * kWords, high[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) dots[i][k] = 0;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = low[i][w], b = high[i][w];
      MmaF16(dots[i], a & kLowNibbles, b & kLowNibbles, a & kHighNibbles, b & kHighNibbles, q[w].x, q[w].y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = low[i][w] >> 8, b = high[i][w] >> 8;
      MmaF16(dots[i], a & kLowNibbles, b & kLowNibbles, a & kHighNibbles, b & kHighNibbles, q[w].z, q[w].w);
    }
  }
}

// One page: scores, softmax, P · V. Tokens from `valid` on are not there yet, whatever the page holds.
template <int kWords, bool kFull>
__device__ __forceinline__ void AttendPage(uint32_t page, uint32_t query, int valid, const QueryFactors (&factors)[2],
                                           Stream<kWords>* stream) {
  using S = Sizes<kWords>;
  const int lane = threadIdx.x % 32, g = lane / 4;
  float scores[4][4];
  Dots<kWords>(page, query, scores);
  uint2 parameters[8];  // of tokens 8j + g
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    parameters[j] = LoadShared64(page + S::kPageParameters + (8 * j + g) * 8);
    if (!kFull && 8 * j + g >= valid) parameters[j] = make_uint2(0, 0);
  }
  float page_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 key = UnpackF16(parameters[2 * i + k / 2].x);
      scores[i][k] = Score(key.x, key.y, scores[i][k], factors[k % 2].sum);
      if (!kFull && 16 * i + 8 * (k / 2) + g >= valid) scores[i][k] = -INFINITY;
      page_max[k % 2] = fmaxf(page_max[k % 2], scores[i][k]);
    }
  }
  if (__any_sync(~0u, ReferenceMoves(page_max[0], stream->reference[0], factors[0].score) ||
                          ReferenceMoves(page_max[1], stream->reference[1], factors[1].score))) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        page_max[h] = fmaxf(page_max[h], __shfl_xor_sync(~0u, page_max[h], lanes));
      }
      const float factor = MoveReference(page_max[h], factors[h].score, &stream->reference[h]);
      stream->sum[h] *= factor;
      stream->zero[h] *= factor;
#pragma unroll
      for (int m = 0; m < 2 * kWords; ++m) {
        stream->accumulators[m][h] *= factor;
        stream->accumulators[m][2 + h] *= factor;
      }
    }
  }
  const float offset[2] = {ExponentOffset(stream->reference[0], factors[0].score),
                           ExponentOffset(stream->reference[1], factors[1].score)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 value[2] = {UnpackF16(parameters[2 * i].y), UnpackF16(parameters[2 * i + 1].y)};
    float p[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) p[k] = Exp2(fmaf(scores[i][k], factors[k % 2].score, offset[k % 2]));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      stream->sum[h] += p[h] + p[2 + h];
      stream->zero[h] = fmaf(p[h], value[0].y, stream->zero[h]);
      stream->zero[h] = fmaf(p[2 + h], value[1].y, stream->zero[h]);
    }
    const uint32_t b0 = TransposeMatrix(PackF16(p[0] * value[0].x, p[1] * value[0].x));
    const uint32_t b1 = TransposeMatrix(PackF16(p[2] * value[1].x, p[3] * value[1].x));
    uint32_t low[kWords], high[kWords];
    LoadShared(page + S::kVCodes + (2 * i * 32 + lane) * 4 * kWords, low);
    LoadShared(page + S::kVCodes + ((2 * i + 1) * 32 + lane) * 4 * kWords, high);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t a = low[w], b = high[w];
      MmaF16(stream->accumulators[2 * w], a & kLowNibbles, a & kHighNibbles, b & kLowNibbles, b & kHighNibbles, b0, b1);
      a >>= 8, b >>= 8;
      MmaF16(stream->accumulators[2 * w + 1], a & kLowNibbles, a & kHighNibbles, b & kLowNibbles, b & kHighNibbles, b0,
             b1);
    }
  }
}

// All chunks of the block.
template <int kWords>
__device__ __forceinline__ void RunStream(DecodeShared<kWords>& shared) {
  using S = Sizes<kWords>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  const uint32_t ring = SharedAddress(shared.ring) + warp * kSlots * S::kHeadBytes;
  const uint32_t barriers = SharedAddress(shared.page_full) + warp * kSlots * 8;
  PageCopier<kWords> copier(shared, ring, barriers);
  int in_flight = 0;
  while (in_flight < kSlots && copier.Start(0, false)) ++in_flight;
  GridDependencyWait();
  int slot = 0;
  uint32_t parity = 0;
  for (int n = 0;; ++n) {
    WaitTurn<kWorks>(shared.work_full, n);
    const ChunkWork& work = shared.works[n % kWorks];
    const int pages = work.page_count;
    if (pages == 0) return;
    const int tokens = work.tokens, query_number = work.query;
    QueryFactors factors[2];
    Stream<kWords> stream;
    for (int i = warp;; i += kStreams) {
      // Also in a chunk without pages for this stream: the copier must not fall behind the chunks.
      while (in_flight < kSlots && copier.Start(n, true)) ++in_flight;
      if (i >= pages) break;
      const uint32_t query = SharedAddress(shared.query[query_number % kWorks]);
      if (i == warp) {
        WaitTurn<kWorks>(shared.query_full, query_number);
        factors[0] = shared.factors[query_number % kWorks][2 * t];
        factors[1] = shared.factors[query_number % kWorks][2 * t + 1];
      }
      const uint32_t address = ring + slot * S::kHeadBytes;
      MbarrierWait(barriers + 8 * slot, parity);
      const int valid = tokens - i * kTokensPerPage;
      if (valid >= kTokensPerPage) {
        AttendPage<kWords, true>(address, query, kTokensPerPage, factors, &stream);
      } else {
        AttendPage<kWords, false>(address, query, valid, factors, &stream);
      }
      __syncwarp();
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      if (slot == 0) parity ^= 1;
      --in_flight;
    }
    // Free buffer, and no arrival that would count for the chunk before.
    if (n >= kMerges) WaitTurn<kWorks>(shared.work_empty, n - kMerges);
    if (warp < pages) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          stream.sum[h] += __shfl_xor_sync(~0u, stream.sum[h], lanes);
          stream.zero[h] += __shfl_xor_sync(~0u, stream.zero[h], lanes);
        }
      }
      float4* merge = shared.merge[n % kMerges][warp];
      if (lane < 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          merge[S::kUnits + 2 * t + h] =
              make_float4(stream.reference[h] * factors[h].score, stream.sum[h], stream.zero[h], 0.0f);
        }
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto& a = stream.accumulators;
        merge[w * 32 + lane] = make_float4(a[2 * w][0], a[2 * w][2], a[2 * w + 1][0], a[2 * w + 1][2]);
        merge[(kWords + w) * 32 + lane] = make_float4(a[2 * w][1], a[2 * w][3], a[2 * w + 1][1], a[2 * w + 1][3]);
      }
    }
    ArriveTurn<kMerges>(shared.merge_full, n);
  }
}

}  // namespace nibble::cuda
