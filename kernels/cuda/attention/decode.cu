// Decode attention; docs/kernels-attention.md shows the pipeline.
//
// A block of four warps owns a piece of the line of heads (segments.h) and walks it chunk by chunk. Each warp computes
// one stream of the chunk: its lane 0 copies page after page into the warp's ring of slots, always kSlots pages ahead
// of the arithmetic and across chunk and head boundaries. At the end of a chunk the warps leave their accumulators in
// shared memory, meet at the chunk's one barrier, and all threads fold them. What is written for the next fold or the
// next head goes to the other of two buffers.
//
// Tensor-core roles: tokens are rows of A and the eight query heads columns of B in K · Q; channels are rows of A and
// heads columns of B in V · P. So codes go from shared memory to A registers with one AND per register.
#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/decode.h"
#include "kernels/cuda/attention/step_rows.cuh"
#include "kernels/cuda/ptx/bulk_copy.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/shared.h"

namespace nibble::cuda {
namespace {

constexpr int kWarps = kStreams;
constexpr int kThreads = kWarps * 32;
constexpr int kSlots = 2;                   // pages in flight per warp
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kListedPartials = 64;         // that are listed at once when a head is combined
constexpr uint32_t kStartsGroup = 1u << 31;
constexpr int kTileHeads = 8;               // query heads of one tensor-core tile

struct DecodeParameters {
  StepView step;
  const uint8_t* pages;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_stride, out_stride;  // elements per row
  int kv_heads, group, tiles;    // query heads per KV head, and tiles of eight that they make
  DecodeRows rows;
  float scale_log2e;
  float4* partials;
  uint32_t* counters;
};

// What one warp or block holds of head sizes: D = 32 · words.
template <int kWords>
struct Sizes {
  static constexpr int kHeadDim = 32 * kWords;
  static constexpr int kHeadBytes = 64 * kHeadDim + 512;
  static constexpr int kVCodes = 32 * kHeadDim;
  static constexpr int kPageParameters = 64 * kHeadDim;
  static constexpr int kUnits = 2 * kWords * 32;               // quadruples of channels of eight heads
  static constexpr int kThreadUnits = kUnits / kThreads;
  static constexpr int kPartialFloat4 = kUnits + kTileHeads;   // accumulators, then (max, sum, zero, -) per head
  static constexpr int kQueryBytes = kWords * 32 * 16;
};

template <int kWords>
struct Shared {
  alignas(128) uint8_t ring[kWarps * kSlots * Sizes<kWords>::kHeadBytes];
  float4 merge[2][kWarps][Sizes<kWords>::kUnits];  // accumulators of a chunk's streams
  SoftmaxState states[2][kWarps][kTileHeads];
  alignas(16) uint8_t query[2][Sizes<kWords>::kQueryBytes];
  QueryFactors factors[2][kTileHeads];
  float4 totals[Sizes<kWords>::kUnits];  // of the head's groups before the current one; each thread keeps its own
  SoftmaxState total_states[Sizes<kWords>::kUnits];
  uint64_t barriers[kWarps * kSlots];
  int scan_cost[kWarps], scan_chunks[kWarps];
  int first_row, first_row_cost;  // where the block's piece of the line begins: row, and cost of the rows before it
  int is_last;
  uint32_t partial_list[kListedPartials];
  int partial_count;
};

// A run of chunks of one head inside the block's piece of the line.
struct Piece {
  int row, head, sequence, tokens;
  int begin, end;    // chunks
  int fresh_page;    // first page that this step's rows write
  int start;         // of the head on the line
  __device__ __forceinline__ int pages() const { return PagesOf(tokens); }
  __device__ __forceinline__ int cost() const { return HeadCost(pages()); }
};

// The rows of the step, and the block's piece [line_begin, line_end) of the line.
struct Walk {
  const DecodeParameters& p;
  int heads;  // per row: KV heads times tiles
  int line_begin, line_end;

  // Tokens of a row's context; 0 for rows that the other kernel takes.
  __device__ __forceinline__ int Tokens(int row, int sequence) const {
    if (p.rows == DecodeRows::kSingle &&
        __ldg(p.step.row_begin + sequence + 1) - __ldg(p.step.row_begin + sequence) != 1) {
      return 0;
    }
    return CheckedPosition(p.step, row) + 1;
  }
  __device__ __forceinline__ void LoadRow(Piece* piece) const {
    while (true) {
      piece->sequence = CheckedSequence(p.step, piece->row);
      piece->tokens = Tokens(piece->row, piece->sequence);
      if (piece->tokens > 0) break;
      piece->row = __ldg(p.step.row_begin + piece->sequence + 1);
    }
    // Rows of a sequence are consecutive: its first row is at most this far back.
    const int back = p.rows == DecodeRows::kSingle ? 1 : p.step.rows;
    piece->fresh_page = max(piece->tokens - back, 0) / kTokensPerPage;
  }
  // The first piece of the block. Empty (begin == end) when the block has nothing to do.
  __device__ __forceinline__ Piece First(int row, int row_start) const {
    Piece piece;
    piece.row = row;
    LoadRow(&piece);
    piece.head = (line_begin - row_start) / piece.cost();
    piece.start = row_start + piece.head * piece.cost();
    piece.begin = ChunkBoundary(line_begin - piece.start, piece.pages());
    piece.end = ChunkBoundary(line_end - piece.start, piece.pages());
    if (piece.begin == ChunksOf(piece.pages())) Advance(&piece);
    return piece;
  }
  // To the next head; begin == end when it belongs to the next block.
  __device__ __forceinline__ void Advance(Piece* piece) const {
    piece->start += piece->cost();
    piece->begin = piece->end = 0;
    if (piece->start >= line_end) return;
    if (++piece->head == heads) {
      piece->head = 0;
      ++piece->row;
      LoadRow(piece);
    }
    piece->end = ChunkBoundary(line_end - piece->start, piece->pages());
  }
};

// Sums cost and chunks over the rows of the step and finds where this block's piece of the line begins.
template <int kWords>
__device__ __forceinline__ HeadLine Survey(const DecodeParameters& p, Walk* walk, Shared<kWords>* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows_each = (p.step.rows + kThreads - 1) / kThreads;
  const int row_begin = min(static_cast<int>(threadIdx.x) * rows_each, p.step.rows);
  const int row_end = min(row_begin + rows_each, p.step.rows);
  int cost = 0, chunks = 0;
  for (int row = row_begin; row < row_end; ++row) {
    const int row_pages = PagesOf(walk->Tokens(row, CheckedSequence(p.step, row)));
    cost += HeadCost(row_pages);
    chunks += ChunksOf(row_pages);
  }
  int cost_to = cost, chunks_to = chunks;  // inclusive sums over the warp's lanes
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int more_cost = __shfl_up_sync(~0u, cost_to, lanes), more_chunks = __shfl_up_sync(~0u, chunks_to, lanes);
    if (lane >= lanes) {
      cost_to += more_cost;
      chunks_to += more_chunks;
    }
  }
  if (lane == 31) {
    shared->scan_cost[warp] = cost_to;
    shared->scan_chunks[warp] = chunks_to;
  }
  __syncthreads();
  int all_cost = 0, all_chunks = 0, before = cost_to - cost;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared->scan_cost[w];
    all_cost += shared->scan_cost[w];
    all_chunks += shared->scan_chunks[w];
  }
  if (static_cast<int64_t>(all_cost) * walk->heads > INT32_MAX) __trap();
  const HeadLine line = CutLine(all_cost * walk->heads, all_chunks * walk->heads, gridDim.x);
  if (static_cast<int>(blockIdx.x) >= line.blocks) return line;
  walk->line_begin = line.Cut(blockIdx.x);
  walk->line_end = line.Cut(blockIdx.x + 1);
  const int target = walk->line_begin / walk->heads;  // in cost of rows
  if (before <= target && target < before + cost) {
    int row = row_begin;
    while (true) {
      const int row_cost = HeadCost(PagesOf(walk->Tokens(row, CheckedSequence(p.step, row))));
      if (target < before + row_cost) break;
      before += row_cost;
      ++row;
    }
    shared->first_row = row;
    shared->first_row_cost = before;
  }
  __syncthreads();
  return line;
}

// The copying side of a warp: walks the same pieces as the arithmetic, up to kSlots pages ahead, and holds the page ids
// of its chunk and of the chunk after it.
template <int kWords>
class PageCopier {
 public:
  __device__ __forceinline__ PageCopier(const Walk& walk, const Piece& first, uint32_t ring, uint32_t barriers)
      : walk_(walk), ring_(ring), barriers_(barriers), policy_(L2EvictFirst()), piece_(first), chunk_(first.begin) {
    page_ = threadIdx.x / 32;
    ids_ = LoadIds(piece_, chunk_);
    Locate();
    PrefetchNext();
  }

  // Starts the copy of the stream's next page into the next slot. Before the kernels in front have finished
  // (`all` false), pages that this step's rows write are left alone: returns false.
  __device__ __forceinline__ bool Start(bool all) {
    while (!done_ && page_ >= chunk_pages_) {
      piece_ = next_piece_;
      chunk_ = next_chunk_;
      ids_ = next_ids_;
      page_ = threadIdx.x / 32;
      Locate();
      PrefetchNext();
    }
    if (done_) return true;
    if (!all && chunk_ * kChunkPages + page_ >= piece_.fresh_page) return false;
    const int page = CheckedPage(walk_.p.step, __shfl_sync(~0u, ids_, page_));
    if (threadIdx.x % 32 == 0) {
      const int head = piece_.head / walk_.p.tiles;
      MbarrierArriveExpect(barriers_ + 8 * slot_, Sizes<kWords>::kHeadBytes);
      BulkCopy(ring_ + slot_ * Sizes<kWords>::kHeadBytes,
               walk_.p.pages + (static_cast<int64_t>(page) * walk_.p.kv_heads + head) * Sizes<kWords>::kHeadBytes,
               Sizes<kWords>::kHeadBytes, barriers_ + 8 * slot_, policy_);
    }
    page_ += kStreams;
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
    return true;
  }

 private:
  __device__ __forceinline__ int LoadIds(const Piece& piece, int chunk) const {
    const int lane = threadIdx.x % 32, page = chunk * kChunkPages + lane;
    if (piece.begin == piece.end || lane >= kChunkPages || page >= piece.pages()) return 0;
    return __ldg(walk_.p.step.page_tables + static_cast<int64_t>(piece.sequence) * walk_.p.step.max_pages + page);
  }
  __device__ __forceinline__ void Locate() {
    done_ = piece_.begin == piece_.end;
    chunk_pages_ = min(piece_.pages() - chunk_ * kChunkPages, kChunkPages);
  }
  __device__ __forceinline__ void PrefetchNext() {
    if (done_) return;
    next_piece_ = piece_;
    next_chunk_ = chunk_ + 1;
    if (next_chunk_ == piece_.end) {
      walk_.Advance(&next_piece_);
      next_chunk_ = next_piece_.begin;
    }
    next_ids_ = LoadIds(next_piece_, next_chunk_);
  }

  const Walk& walk_;
  const uint32_t ring_, barriers_;
  const uint64_t policy_;
  Piece piece_, next_piece_;
  int chunk_, next_chunk_ = 0;
  int ids_, next_ids_ = 0;
  int page_, chunk_pages_ = 0, slot_ = 0;
  bool done_ = false;
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

template <int kWords>
__device__ __forceinline__ void LoadWords(uint32_t address, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 4) {
    const uint4 v = LoadShared128(address);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = LoadShared64(address);
    words[0] = v.x, words[1] = v.y;
  }
}

// dots[i]: tokens 16i + g (first two) and 16i + 8 + g of heads 2t, 2t + 1.
template <int kWords>
__device__ __forceinline__ void Dots(uint32_t page, uint32_t query, float (&dots)[4][4]) {
  const int lane = threadIdx.x % 32;
  uint4 q[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) q[w] = LoadShared128(query + (w * 32 + lane) * 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low[kWords], high[kWords];
    LoadWords<kWords>(page + (2 * i * 32 + lane) * 4 * kWords, low);
    LoadWords<kWords>(page + ((2 * i + 1) * 32 + lane) * 4 * kWords, high);
#pragma unroll
    for (int k = 0; k < 4; ++k) dots[i][k] = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t a = low[w], b = high[w];
      MmaF16(dots[i], a & kLowNibbles, b & kLowNibbles, a & kHighNibbles, b & kHighNibbles, q[w].x, q[w].y);
      a >>= 8, b >>= 8;
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
    LoadWords<kWords>(page + S::kVCodes + (2 * i * 32 + lane) * 4 * kWords, low);
    LoadWords<kWords>(page + S::kVCodes + ((2 * i + 1) * 32 + lane) * 4 * kWords, high);
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

// A quadruple of channels of one head while it is folded.
struct Unit {
  SoftmaxState state;
  float4 accumulators;
};
__device__ __forceinline__ void FoldInto(Unit* into, const SoftmaxState& state, const float4& accumulators) {
  const FoldFactors factors = Fold(&into->state, state);
  into->accumulators.x = Fold(into->accumulators.x, accumulators.x, factors);
  into->accumulators.y = Fold(into->accumulators.y, accumulators.y, factors);
  into->accumulators.z = Fold(into->accumulators.z, accumulators.z, factors);
  into->accumulators.w = Fold(into->accumulators.w, accumulators.w, factors);
}
__device__ __forceinline__ void FoldInto(Unit* into, bool first, const Unit& unit) {
  if (first) {
    *into = unit;
  } else {
    FoldInto(into, unit.state, unit.accumulators);
  }
}

// Unit u = 32 i + lane: head 2t + i / words, channels 4·words·g + 4 (i % words) ...
template <int kWords>
__device__ __forceinline__ int UnitHead(int unit) {
  return 2 * (unit % 4) + unit / (32 * kWords);
}
template <int kWords>
__device__ __forceinline__ int UnitChannel(int unit) {
  return 4 * kWords * (unit % 32 / 4) + 4 * (unit / 32 % kWords);
}

template <int kWords>
__device__ __forceinline__ void StoreOutput(const DecodeParameters& p, const Piece& piece, int index, const Unit& unit) {
  const int tile_head = UnitHead<kWords>(index), in_group = piece.head % p.tiles * kTileHeads + tile_head;
  if (in_group >= p.group) return;
  const float inverse = 1.0f / unit.state.sum;
  const float4& a = unit.accumulators;
  const uint2 packed =
      make_uint2(PackBf16(Output(a.x, kLowNibbleUnit, unit.state.zero, inverse),
                          Output(a.y, kHighNibbleUnit, unit.state.zero, inverse)),
                 PackBf16(Output(a.z, kLowNibbleUnit, unit.state.zero, inverse),
                          Output(a.w, kHighNibbleUnit, unit.state.zero, inverse)));
  const int head = piece.head / p.tiles * p.group + in_group;
  *reinterpret_cast<uint2*>(p.out + piece.row * p.out_stride + head * Sizes<kWords>::kHeadDim +
                            UnitChannel<kWords>(index)) = packed;
}

template <int kWords>
__device__ __forceinline__ void StorePartial(float4* partial, int index, const Unit& unit) {
  partial[index] = unit.accumulators;
  if (UnitChannel<kWords>(index) == 0) {
    partial[Sizes<kWords>::kUnits + UnitHead<kWords>(index)] =
        make_float4(unit.state.max, unit.state.sum, unit.state.zero, 0.0f);
  }
}

// Number of the first partial that a block keeps of a piece: that of the piece which begins inside a head comes first,
// the other's at the end.
__device__ __forceinline__ int PartialsBegin(const DecodeParameters& p, int block, bool begins_inside) {
  const int per_block = MaxPartials(p.step.max_pages);
  const int groups = (ChunksOf(p.step.max_pages) + kGroupChunks - 1) / kGroupChunks;
  return block * per_block + (begins_inside ? 0 : per_block - groups);
}

// Lists the partials of a divided head in order, block after block, from number `skip` on, as many as the list holds:
// their places, and a bit for those that start a group. Returns how many there are in all. One warp.
template <int kWords>
__device__ __forceinline__ int ListPartials(const DecodeParameters& p, const HeadLine& line, const Piece& piece,
                                            int first_block, int skip, uint32_t* list) {
  const int lane = threadIdx.x % 32, pages = piece.pages(), chunks = ChunksOf(pages);
  int listed = 0;
  for (int block = first_block + lane;; block += 32) {
    const int begin = ChunkBoundary(line.Cut(block) - piece.start, pages);
    const int end = ChunkBoundary(line.Cut(block + 1) - piece.start, pages);
    const int count = PartialCount(begin, end);
    int to = count;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int more = __shfl_up_sync(~0u, to, lanes);
      if (lane >= lanes) to += more;
    }
    const uint32_t place = PartialsBegin(p, block, begin != 0);
    int chunk = begin;
    for (int i = 0; i < count; ++i) {
      const int at = listed + to - count + i - skip;
      if (at >= 0 && at < kListedPartials) {
        list[at] = (place + i) | (chunk % kGroupChunks == 0 ? kStartsGroup : 0);
      }
      chunk = PartialEnd(chunk, end);
    }
    listed += __shfl_sync(~0u, to, 31);
    if (__shfl_sync(~0u, end, 31) == chunks) return listed;
  }
}

// The block that finished a divided head last folds its partials, in order, and writes the output.
template <int kWords>
__device__ __forceinline__ void Combine(const DecodeParameters& p, const HeadLine& line, const Piece& piece,
                                        int first_block, Shared<kWords>* shared) {
  using S = Sizes<kWords>;
  constexpr int kBatch = 8;  // partials loaded at once
  Unit total[S::kThreadUnits], group[S::kThreadUnits];
  bool total_empty = true, group_empty = true;
  for (int skip = 0;; skip += kListedPartials) {
    if (threadIdx.x < 32) {
      const int all = ListPartials<kWords>(p, line, piece, first_block, skip, shared->partial_list);
      if (threadIdx.x == 0) shared->partial_count = all - skip;
    }
    __syncthreads();
    const int listed = shared->partial_count, count = min(listed, kListedPartials);
#pragma unroll 1
    for (int base = 0; base < count; base += kBatch) {
      float4 accumulators[kBatch][S::kThreadUnits], states[kBatch][S::kThreadUnits];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float4* partial = p.partials + static_cast<int64_t>(shared->partial_list[min(base + k, count - 1)] &
                                                                  ~kStartsGroup) * S::kPartialFloat4;
#pragma unroll
        for (int n = 0; n < S::kThreadUnits; ++n) {
          const int index = threadIdx.x + n * kThreads;
          accumulators[k][n] = __ldcg(partial + index);
          states[k][n] = __ldcg(partial + S::kUnits + UnitHead<kWords>(index));
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (base + k >= count) break;
        const bool starts = (shared->partial_list[base + k] & kStartsGroup) != 0;
#pragma unroll
        for (int n = 0; n < S::kThreadUnits; ++n) {
          if (starts && !group_empty) FoldInto(&total[n], total_empty, group[n]);
          FoldInto(&group[n], starts || group_empty,
                   {{states[k][n].x, states[k][n].y, states[k][n].z}, accumulators[k][n]});
        }
        if (starts && !group_empty) total_empty = false;
        group_empty = false;
      }
    }
    if (listed <= kListedPartials) break;
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < S::kThreadUnits; ++n) {
    FoldInto(&total[n], total_empty, group[n]);
    StoreOutput<kWords>(p, piece, threadIdx.x + n * kThreads, total[n]);
  }
}

template <int kWords>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    DecodeKernel(const __grid_constant__ DecodeParameters p) {
  using S = Sizes<kWords>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  Shared<kWords>& shared = *reinterpret_cast<Shared<kWords>*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  const uint32_t ring = SharedAddress(shared.ring) + warp * kSlots * S::kHeadBytes;
  const uint32_t barriers = SharedAddress(shared.barriers) + warp * kSlots * 8;
  GridDependencyLaunch();
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) MbarrierInit(barriers + 8 * i, 1);
    MbarrierInitFence();
  }
  Walk walk = {p, p.kv_heads * p.tiles, 0, 0};
  const HeadLine line = Survey<kWords>(p, &walk, &shared);
  if (static_cast<int>(blockIdx.x) >= line.blocks) {
    GridDependencyWait();  // a grid must not finish before the grids in front of it
    return;
  }
  Piece piece = walk.First(shared.first_row, shared.first_row_cost * walk.heads);

  PageCopier<kWords> copier(walk, piece, ring, barriers);
  int started = 0;
  while (started < kSlots && copier.Start(false)) ++started;
  GridDependencyWait();
  for (; started < kSlots; ++started) copier.Start(true);

  // Eight channels of one head per thread; the next head's are fetched while this one is computed.
  const int query_head = threadIdx.x / (S::kHeadDim / 8), query_channels = threadIdx.x % (S::kHeadDim / 8);
  const auto load_query = [&](const Piece& of) {
    const int in_group = of.head % p.tiles * kTileHeads + query_head;
    if (of.begin == of.end || query_head >= kTileHeads || in_group >= p.group) return make_uint4(0, 0, 0, 0);
    return __ldcg(reinterpret_cast<const uint4*>(
        p.q + of.row * p.q_stride + (of.head / p.tiles * p.group + in_group) * S::kHeadDim + query_channels * 8));
  };
  const auto prepare_query = [&](const uint4& raw, int buffer) {
    if (query_head >= kTileHeads) return;
    QueryFactors factors;
    const uint4 words = PrepareQuery<S::kHeadDim>(raw, p.scale_log2e, &factors);
    const int query_t = query_channels / kWords, word = query_channels % kWords;
    StoreShared128(SharedAddress(shared.query[buffer]) + (word * 32 + query_head * 4 + query_t) * 16, words);
    if (query_channels == 0) shared.factors[buffer][query_head] = factors;
  };
  prepare_query(load_query(piece), 0);
  __syncthreads();

  int slot = 0, query_buffer = 0, merge_buffer = 0;
  uint32_t parity = 0;
  while (piece.begin < piece.end) {
    Piece next = piece;
    walk.Advance(&next);
    const uint4 next_query = load_query(next);
    const uint32_t query = SharedAddress(shared.query[query_buffer]);
    const QueryFactors factors[2] = {shared.factors[query_buffer][2 * t], shared.factors[query_buffer][2 * t + 1]};
    const int pages = piece.pages(), chunks = ChunksOf(pages);
    const bool whole = piece.begin == 0 && piece.end == chunks;
    float4* partial =
        p.partials + static_cast<int64_t>(PartialsBegin(p, blockIdx.x, piece.begin != 0)) * S::kPartialFloat4;
    Unit group[S::kThreadUnits];
    for (int chunk = piece.begin; chunk < piece.end; ++chunk) {
      const int chunk_pages = min(pages - chunk * kChunkPages, kChunkPages);
      const int chunk_tokens = piece.tokens - chunk * kChunkPages * kTokensPerPage;
      Stream<kWords> stream;
      for (int i = warp; i < chunk_pages; i += kStreams) {
        const uint32_t address = ring + slot * S::kHeadBytes;
        MbarrierWait(barriers + 8 * slot, parity);
        const int valid = chunk_tokens - i * kTokensPerPage;
        if (valid >= kTokensPerPage) {
          AttendPage<kWords, true>(address, query, kTokensPerPage, factors, &stream);
        } else {
          AttendPage<kWords, false>(address, query, valid, factors, &stream);
        }
        __syncwarp();
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        if (slot == 0) parity ^= 1;
        copier.Start(true);
      }
      if (warp < chunk_pages) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) {
            stream.sum[h] += __shfl_xor_sync(~0u, stream.sum[h], lanes);
            stream.zero[h] += __shfl_xor_sync(~0u, stream.zero[h], lanes);
          }
          if (lane < 4) {
            shared.states[merge_buffer][warp][2 * t + h] = {stream.reference[h] * factors[h].score, stream.sum[h], stream.zero[h]};
          }
        }
        float4* merge = shared.merge[merge_buffer][warp];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const auto& a = stream.accumulators;
          merge[w * 32 + lane] = make_float4(a[2 * w][0], a[2 * w][2], a[2 * w + 1][0], a[2 * w + 1][2]);
          merge[(kWords + w) * 32 + lane] = make_float4(a[2 * w][1], a[2 * w][3], a[2 * w + 1][1], a[2 * w + 1][3]);
        }
      }
      const bool piece_ends = chunk + 1 == piece.end;
      if (piece_ends) prepare_query(next_query, query_buffer ^ 1);
      __syncthreads();
      const bool group_starts = chunk % kGroupChunks == 0;
      const bool group_ends = (chunk + 1) % kGroupChunks == 0 || piece_ends;
      const bool group_known = chunk / kGroupChunks * kGroupChunks >= piece.begin;  // its first chunk was folded here
      const int streams = min(chunk_pages, kStreams);
#pragma unroll
      for (int n = 0; n < S::kThreadUnits; ++n) {
        const int index = threadIdx.x + n * kThreads, head = UnitHead<kWords>(index);
        Unit unit;
#pragma unroll
        for (int w = 0; w < kStreams; ++w) {
          if (w >= streams) break;
          FoldInto(&unit, w == 0, {shared.states[merge_buffer][w][head], shared.merge[merge_buffer][w][index]});
        }
        if (!group_known) {
          StorePartial<kWords>(partial, index, unit);
          continue;
        }
        FoldInto(&group[n], group_starts, unit);
        if (!group_ends) continue;
        if (!whole) {
          StorePartial<kWords>(partial, index, group[n]);
          continue;
        }
        if (chunk >= kGroupChunks) {
          Unit total = {shared.total_states[index], shared.totals[index]};
          FoldInto(&total, group[n].state, group[n].accumulators);
          group[n] = total;
        }
        if (piece_ends) {
          StoreOutput<kWords>(p, piece, index, group[n]);
        } else {
          shared.total_states[index] = group[n].state;
          shared.totals[index] = group[n].accumulators;
        }
      }
      if (!group_known || group_ends) partial += S::kPartialFloat4;
      merge_buffer ^= 1;
    }
    query_buffer ^= 1;
    if (!whole) {
      int first_block = max(piece.start / line.share - 1, 0);
      while (ChunkBoundary(line.Cut(first_block + 1) - piece.start, pages) == 0) ++first_block;
      __threadfence();  // this thread's partials, before the block's arrival
      __syncthreads();
      if (threadIdx.x == 0) {
        const uint32_t done = piece.end - piece.begin;
        const bool last = atomicAdd(p.counters + first_block, done) + done == static_cast<uint32_t>(chunks);
        if (last) p.counters[first_block] = 0;
        __threadfence();
        shared.is_last = last;
      }
      __syncthreads();
      if (shared.is_last) Combine<kWords>(p, line, piece, first_block, &shared);
    }
    piece = next;
  }
}

template <int kWords>
void LaunchDecode(const Device& device, const AttentionArgs& args, DecodeRows rows, uint32_t* counters) {
  const int64_t group = args.q_heads / args.pages.layout.kv_heads;
  const int64_t scratch = DecodeScratchBytes(device.multiprocessors, 32 * kWords, args.step.max_pages);
  const DecodeParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .pages = args.pages.data,
      .q = static_cast<const __nv_bfloat16*>(args.qkv.data),
      .out = static_cast<__nv_bfloat16*>(args.out.data),
      .q_stride = args.qkv.cols,
      .out_stride = args.out.cols,
      .kv_heads = static_cast<int>(args.pages.layout.kv_heads),
      .group = static_cast<int>(group),
      .tiles = static_cast<int>((group + kTileHeads - 1) / kTileHeads),
      .rows = rows,
      .scale_log2e = args.scale * 1.4426950408889634f,
      .partials = device.Scratch<float4>(scratch),
      .counters = counters,
  };
  constexpr int kSharedBytes = sizeof(Shared<kWords>);
  AllowSharedMemory(DecodeKernel<kWords>, kSharedBytes);
  Launch(device, DecodeKernel<kWords>, dim3(device.multiprocessors * kBlocksPerMultiprocessor), dim3(kThreads),
         kSharedBytes, parameters);
}

}  // namespace

int64_t DecodeScratchBytes(int multiprocessors, int64_t head_dim, int64_t max_pages) {
  const int64_t partial_bytes = (head_dim * kTileHeads + 4 * kTileHeads) * static_cast<int64_t>(sizeof(float));
  return int64_t{multiprocessors} * kBlocksPerMultiprocessor * MaxPartials(static_cast<int>(max_pages)) * partial_bytes;
}

int64_t DecodeCounterBytes(int multiprocessors) {
  return int64_t{multiprocessors} * kBlocksPerMultiprocessor * static_cast<int64_t>(sizeof(uint32_t));
}

void DecodeAttention(const Device& device, const AttentionArgs& args, DecodeRows rows, uint32_t* counters) {
  if (args.pages.layout.head_dim == 128) {
    LaunchDecode<4>(device, args, rows, counters);
  } else {
    LaunchDecode<2>(device, args, rows, counters);
  }
}

}  // namespace nibble::cuda
