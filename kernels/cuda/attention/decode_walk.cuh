// The warp that walks a block's shares of the line of heads: it finds the chunks, names their pages and prepares the
// queries, up to kWorks chunks ahead of the fold.
#pragma once

#include "kernels/cuda/attention/decode_shared.cuh"
#include "kernels/cuda/ptx/launch.h"

namespace nibble::cuda {

// The rows of the step, and a share [line_begin, line_end) of the line.
struct Walk {
  const DecodeParameters& p;
  int heads;  // per row: KV heads times tiles
  int line_begin, line_end;

  // Tokens of a row's context; 0 for rows that the other kernel takes.
  __device__ __forceinline__ int Tokens(int row) const {
    if (p.rows == DecodeRows::kSingle) {
      const int sequence = CheckedSequence(p.step, row);
      if (__ldg(p.step.row_begin + sequence + 1) - __ldg(p.step.row_begin + sequence) != 1) return 0;
    }
    return CheckedPosition(p.step, row) + 1;
  }
  __device__ __forceinline__ int RowCost(int row) const { return HeadCost(PagesOf(Tokens(row))); }
  __device__ __forceinline__ void LoadRow(Piece* piece) const {
    while (true) {
      piece->sequence = CheckedSequence(p.step, piece->row);
      piece->tokens = Tokens(piece->row);
      if (piece->tokens > 0) break;
      piece->row = __ldg(p.step.row_begin + piece->sequence + 1);
    }
    // Rows of a sequence are consecutive: its first row is at most this far back.
    const int back = p.rows == DecodeRows::kSingle ? 1 : p.step.rows;
    piece->fresh_page = max(piece->tokens - back, 0) / kTokensPerPage;
  }
  // The first piece of the share. Empty (begin == end) when nothing is in it.
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
  // To the next head; begin == end when it belongs to the next share.
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

// Sums cost and chunks over the rows of the step and finds where this block's share of the line begins, and where the
// drawn ones do. All threads of the block.
template <int kWords>
__device__ __forceinline__ HeadLine Survey(const DecodeParameters& p, Walk* walk, DecodeShared<kWords>* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows_each = (p.step.rows + kDecodeThreads - 1) / kDecodeThreads;
  const int row_begin = min(static_cast<int>(threadIdx.x) * rows_each, p.step.rows);
  const int row_end = min(row_begin + rows_each, p.step.rows);
  int cost = 0, chunks = 0;
  bool divisible = false;
  for (int row = row_begin; row < row_end; ++row) {
    const int row_pages = PagesOf(walk->Tokens(row));
    cost += HeadCost(row_pages);
    chunks += ChunksOf(row_pages);
    divisible = divisible || row_pages > kChunkPages;
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
  const bool single_chunks = __syncthreads_or(divisible) == 0;
  int all_cost = 0, all_chunks = 0, before = cost_to - cost;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    if (w < warp) before += shared->scan_cost[w];
    all_cost += shared->scan_cost[w];
    all_chunks += shared->scan_chunks[w];
  }
  if (static_cast<int64_t>(all_cost) * walk->heads > INT32_MAX) __trap();
  const HeadLine line = CutLine(all_cost * walk->heads, all_chunks * walk->heads, single_chunks, gridDim.x);
  if (static_cast<int>(blockIdx.x) >= line.blocks) return line;
  walk->line_begin = line.Cut(blockIdx.x);
  walk->line_end = line.Cut(blockIdx.x + 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int target = (i == 0 ? walk->line_begin : line.DrawnBegin()) / walk->heads;  // in cost of rows
    if (before > target || target >= before + cost) continue;
    int row = row_begin, row_before = before;
    while (true) {
      const int row_cost = walk->RowCost(row);
      if (target < row_before + row_cost) break;
      row_before += row_cost;
      ++row;
    }
    shared->first_row[i] = row;
    shared->first_row_cost[i] = row_before;
  }
  __syncthreads();
  return line;
}

template <int kWords>
class Walker {
 public:
  __device__ __forceinline__ Walker(const Walk& walk, const HeadLine& line, DecodeShared<kWords>& shared)
      : walk_(walk), line_(line), shared_(shared) {}

  // All chunks of the block, and the end. Ends with the kernels in front finished.
  __device__ __forceinline__ void Run() {
    piece_ = walk_.First(shared_.first_row[0], shared_.first_row_cost[0] * walk_.heads);
    row_ = shared_.first_row[1];
    row_cost_ = shared_.first_row_cost[1];
    bool waited = false;
    const auto wait = [&] {
      if (!waited) GridDependencyWait();
      waited = true;
    };
    while (true) {
      if (piece_.begin == piece_.end) {
        wait();
        if (!Draw()) break;
        continue;
      }
      uint4 raw[kWords];
      if (waited) LoadQuery(raw);
      for (int chunk = piece_.begin; chunk < piece_.end; ++chunk) {
        Publish(chunk);
        if (chunk > piece_.begin) continue;
        if (!waited) {
          wait();
          LoadQuery(raw);
        }
        PrepareQueries(raw);
      }
      walk_.Advance(&piece_);
      ++queries_;
    }
    if (works_ >= kWorks) WaitTurn<kWorks>(shared_.work_empty, works_ - kWorks);
    if (Lane() == 0) shared_.works[works_ % kWorks].page_count = 0;
    __syncwarp();
    ArriveTurn<kWorks>(shared_.work_full, works_);
  }

 private:
  static __device__ __forceinline__ int Lane() { return threadIdx.x % 32; }

  // Takes a drawn share, if there are any left, once the block is about to run out of work.
  __device__ __forceinline__ bool Draw() {
    if (line_.drawn == 0) return false;
    if (works_ >= kDrawAhead) WaitTurn<kWorks>(shared_.work_empty, works_ - kDrawAhead);
    int drawn = 0;
    if (Lane() == 0) {
      uint32_t* draws = walk_.p.counters + gridDim.x;
      drawn = static_cast<int>(atomicAdd(draws, 1));
      if (drawn == line_.drawn + line_.blocks - 1) *draws = 0;  // every block draws until it gets nothing: the last one
    }
    drawn = __shfl_sync(~0u, drawn, 0);
    if (drawn >= line_.drawn) return false;
    walk_.line_begin = line_.Cut(line_.blocks + drawn);
    walk_.line_end = line_.Cut(line_.blocks + drawn + 1);
    Seek(walk_.line_begin / walk_.heads);
    piece_ = walk_.First(row_, row_cost_ * walk_.heads);
    return true;
  }

  // Goes forward to the row at `target`, in cost of rows.
  __device__ __forceinline__ void Seek(int target) {
    while (true) {
      const int row = row_ + Lane();
      const int cost = row < walk_.p.step.rows ? walk_.RowCost(row) : 0;
      int to = cost;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int more = __shfl_up_sync(~0u, to, lanes);
        if (Lane() >= lanes) to += more;
      }
      const uint32_t past = __ballot_sync(~0u, row_cost_ + to > target);
      if (past != 0) {
        const int first = __ffs(past) - 1;
        row_ += first;
        row_cost_ += __shfl_sync(~0u, to - cost, first);
        return;
      }
      row_ += 32;
      row_cost_ += __shfl_sync(~0u, to, 31);
      if (row_ >= walk_.p.step.rows) __trap();
    }
  }

  __device__ __forceinline__ void Publish(int chunk) {
    const int first_page = chunk * kChunkPages, pages = min(piece_.pages() - first_page, kChunkPages);
    int id = 0;
    if (Lane() < pages) {
      id = CheckedPage(walk_.p.step,
                       __ldg(walk_.p.step.page_tables + static_cast<int64_t>(piece_.sequence) * walk_.p.step.max_pages +
                             first_page + Lane()));
    }
    const int head = piece_.head / walk_.p.tiles;
    if (works_ >= kWorks) WaitTurn<kWorks>(shared_.work_empty, works_ - kWorks);
    ChunkWork& work = shared_.works[works_ % kWorks];
    if (Lane() < pages) {
      work.pages[Lane()] =
          walk_.p.pages + (static_cast<int64_t>(id) * walk_.p.kv_heads + head) * Sizes<kWords>::kHeadBytes;
    }
    if (Lane() == 0) {
      work.page_count = pages;
      work.tokens = piece_.tokens - first_page * kTokensPerPage;
      work.fresh_page = piece_.fresh_page - first_page;
      work.query = queries_;
      work.piece = piece_;
    }
    ArriveTurn<kWorks>(shared_.work_full, works_);
    ++works_;
  }

  // Lane's eight channels of kWords of the tile's heads: of task 32 i + lane, head task / (D / 8).
  __device__ __forceinline__ void LoadQuery(uint4 (&raw)[kWords]) const {
    using S = Sizes<kWords>;
    const DecodeParameters& p = walk_.p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int task = i * 32 + Lane(), in_group = piece_.head % p.tiles * kTileHeads + task / (S::kHeadDim / 8);
      raw[i] = make_uint4(0, 0, 0, 0);
      if (in_group < p.group) {
        raw[i] = __ldcg(reinterpret_cast<const uint4*>(p.q + piece_.row * p.q_stride +
                                                       (piece_.head / p.tiles * p.group + in_group) * S::kHeadDim +
                                                       task % (S::kHeadDim / 8) * 8));
      }
    }
  }
  // Its buffer is free: a piece has at least one chunk, so the piece kWorks before ended kWorks chunks ago or earlier,
  // and the chunk published last waited for that one's fold.
  __device__ __forceinline__ void PrepareQueries(const uint4 (&raw)[kWords]) {
    using S = Sizes<kWords>;
    const int buffer = queries_ % kWorks;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int task = i * 32 + Lane(), head = task / (S::kHeadDim / 8), channels = task % (S::kHeadDim / 8);
      QueryFactors factors;
      const uint4 words = PrepareQuery<S::kHeadDim>(raw[i], walk_.p.scale_log2e, &factors);
      StoreShared128(
          SharedAddress(shared_.query[buffer]) + (channels % kWords * 32 + head * 4 + channels / kWords) * 16, words);
      if (channels == 0) shared_.factors[buffer][head] = factors;
    }
    ArriveTurn<kWorks>(shared_.query_full, queries_);
  }

  Walk walk_;
  const HeadLine line_;
  DecodeShared<kWords>& shared_;
  Piece piece_;
  int row_, row_cost_;           // a row at or in front of the next drawn share, and the cost of the rows before it
  int works_ = 0, queries_ = 0;  // handed out so far
};

}  // namespace nibble::cuda
