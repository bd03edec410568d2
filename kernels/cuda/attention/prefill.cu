// Prefill attention; docs/kernels-attention.md shows the pipeline.
//
// A block computes tiles of 128 (row, query head) pairs that share a KV head: consecutive rows of one sequence with all
// heads of the group. One warpgroup unpacks codes into f16 operands in shared memory, page after page; two warpgroups
// of 64 pairs each run S = Q · K and O += P · V on them. Pages of a chunk are taken stream by stream, so that the chain
// of steps into an accumulator, its rescalings and the folds are those of the decode kernel (canonical.cuh).
//
// A page whose tokens all lie behind a row adds nothing to it, to the bit: its scores are -inf, its probabilities 0.
#include "kernels/cuda/attention/canonical.cuh"
#include "kernels/cuda/attention/prefill.h"
#include "kernels/cuda/attention/step_rows.cuh"
#include "kernels/cuda/ptx/fence.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/ptx/mbarrier.h"
#include "kernels/cuda/ptx/shared.h"
#include "kernels/cuda/ptx/wgmma_f16.h"

namespace nibble::cuda {
namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kConsumers = 2;                 // warpgroups
constexpr int kTileQueries = 64 * kConsumers;
constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
constexpr int kStages = 3;                    // unpacked pages
constexpr int kAtomBytes = 128;               // of a row, in the layout that a 128-byte swizzle works on

// Registers per thread after the launch's 168 have been shared out again.
constexpr int kProducerRegisters = 128;
constexpr int kConsumerRegisters = 184;

struct PrefillParameters {
  StepView step;
  const uint8_t* pages;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_stride, out_stride;  // elements per row
  int kv_heads, group;
  int tile_rows;                 // rows whose group · tile_rows query heads make a tile
  float scale_log2e;
  float4* folded;                // per warpgroup: what is folded over the chunks of a group, and over groups
};

template <int kHeadDim>
struct Stage {
  alignas(1024) uint8_t k[kTokensPerPage * kHeadDim * 2];  // tokens × channels, in atoms of 64 channels
  alignas(1024) uint8_t v[kHeadDim * kTokensPerPage * 2];  // channels × tokens
};

template <int kHeadDim>
struct Shared {
  Stage<kHeadDim> stages[kStages];
  alignas(1024) uint8_t q[kConsumers][64 * kHeadDim * 2];
  float4 chunks[kConsumers][kHeadDim / 8 + 2][kWarpgroupThreads];  // what is folded over the streams of a chunk
  float2 k_parameters[kStages][kTokensPerPage];                // scale, zero
  float2 v_parameters[kStages][kTokensPerPage];
  QueryFactors factors[kConsumers][64];
  uint64_t full[kStages], empty[kStages];
};

// 128-byte swizzle: 16-byte unit c of row r lies at unit c ^ (r % 8).
__device__ __forceinline__ uint32_t Swizzled(int row, int byte) {
  return row * kAtomBytes + ((byte / 16 ^ row % 8) * 16 | byte % 16);
}

// One tile: rows [row, row + rows) of a sequence, the first at `position`.
struct Tile {
  int sequence, row, rows, position, kv_head;
  __device__ __forceinline__ int pages() const { return PagesOf(position + rows); }
};

// Tile `index` of the step; rows == 0 when there is none. Called by whole warps. Later tiles of a sequence, which have
// longer contexts, come first.
__device__ __forceinline__ Tile FindTile(const PrefillParameters& p, int index) {
  const int lane = threadIdx.x % 32;
  int rank = index / p.kv_heads;
  for (int base = 0; base < p.step.sequences; base += 32) {
    const int sequence = base + lane;
    int first = 0, rows = 0;
    if (sequence < p.step.sequences) {
      first = __ldg(p.step.row_begin + sequence);
      rows = __ldg(p.step.row_begin + sequence + 1) - first;
    }
    const int tiles = rows > 1 ? (rows + p.tile_rows - 1) / p.tile_rows : 0;
    int to = tiles;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int more = __shfl_up_sync(~0u, to, lanes);
      if (lane >= lanes) to += more;
    }
    const uint32_t owner = __ballot_sync(~0u, rank >= to - tiles && rank < to);
    if (owner != 0) {
      const int from = __ffs(owner) - 1;
      const int tile = __shfl_sync(~0u, tiles - 1 - (rank - (to - tiles)), from);
      Tile found;
      found.sequence = base + from;
      found.row = __shfl_sync(~0u, first, from) + tile * p.tile_rows;
      found.rows = min(__shfl_sync(~0u, rows, from) - tile * p.tile_rows, p.tile_rows);
      found.position = CheckedPosition(p.step, found.row);
      found.kv_head = index % p.kv_heads;
      return found;
    }
    rank -= __shfl_sync(~0u, to, 31);
  }
  return {0, 0, 0, 0, 0};
}

// The pages of a context in the order of the streams.
struct PageOrder {
  int pages, chunk = 0, stream = 0, step = 0;

  __device__ __forceinline__ explicit PageOrder(int count) : pages(count) {}
  __device__ __forceinline__ int chunk_pages() const { return min(pages - chunk * kChunkPages, kChunkPages); }
  __device__ __forceinline__ bool done() const { return chunk * kChunkPages >= pages; }
  __device__ __forceinline__ int page() const { return chunk * kChunkPages + stream + step * kStreams; }
  __device__ __forceinline__ bool stream_ends() const { return stream + (step + 1) * kStreams >= chunk_pages(); }
  __device__ __forceinline__ bool chunk_ends() const {
    return stream_ends() && stream + 1 == min(chunk_pages(), kStreams);
  }
  __device__ __forceinline__ bool page_is_last() const { return chunk_ends() && (chunk + 1) * kChunkPages >= pages; }
  __device__ __forceinline__ void Next() {
    if (!stream_ends()) {
      ++step;
      return;
    }
    const bool chunk_ended = chunk_ends();
    step = 0;
    ++stream;
    if (chunk_ended) {
      stream = 0;
      ++chunk;
    }
  }
};

// ---- unpacking -------------------------------------------------------------------------------------------------------

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

__device__ __forceinline__ void StoreShared32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void StoreShared64(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

// What a thread of the unpacking warpgroup takes from a page: two pieces of K, of (token, quarter of the channels), two
// of V, of (pair of tokens, eighth of the channels), and half of a token's parameters.
template <int kHeadDim>
struct RawPage {
  static constexpr int kWords = kHeadDim / 32;
  uint32_t k[2][kWords], v[2][kWords];
  uint32_t parameters;

  // Lanes so that both the reads and the writes of a warp hit every bank once.
  static __device__ __forceinline__ int KToken(int n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    return (warp * 2 + n) * 8 + lane / 4 % 4 * 2 + lane / 16;
  }
  static __device__ __forceinline__ int VBlock() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int VEighth(int n) { return threadIdx.x / 32 % 4 * 2 + n; }

  __device__ __forceinline__ void Load(const uint8_t* head) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      LoadWords<kWords>(head + KToken(n) * kHeadDim / 2 + t * 4 * kWords, k[n]);
      LoadWords<kWords>(head + 32 * kHeadDim + VBlock() * 4 * kHeadDim + VEighth(n) * 16 * kWords + t * 4 * kWords, v[n]);
    }
    const int i = threadIdx.x % kWarpgroupThreads;
    parameters = __ldcg(reinterpret_cast<const uint32_t*>(head + KvParameters(kHeadDim, 0)) + i);
  }

  // Operands of the k-steps: of K, the four channels of a lane of the decode kernel's A operand lie side by side; of V,
  // tokens in order. Queries are laid out like K.
  // Parameters of tokens from `valid` on may be anything and become zero.
  __device__ __forceinline__ void Unpack(uint32_t stage_k, uint32_t stage_v, int valid, float2* k_parameters,
                                         float2* v_parameters) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int token = KToken(n);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int byte = 64 * w + 8 * t;
        const uint32_t atom = stage_k + byte / kAtomBytes * (kTokensPerPage * kAtomBytes);
        const uint32_t a = k[n][w], b = a >> 8;
        StoreShared64(atom + Swizzled(token, byte % kAtomBytes), a & kLowNibbles, a & kHighNibbles);
        StoreShared64(atom + Swizzled(token, byte % kAtomBytes + 32), b & kLowNibbles, b & kHighNibbles);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int channel = 4 * kWords * VEighth(n) + 4 * w, byte = VBlock() * 16 + t * 4;
        const uint32_t a = v[n][w], b = a >> 8;
        StoreShared32(stage_v + Swizzled(channel, byte), a & kLowNibbles);
        StoreShared32(stage_v + Swizzled(channel + 1, byte), a & kHighNibbles);
        StoreShared32(stage_v + Swizzled(channel + 2, byte), b & kLowNibbles);
        StoreShared32(stage_v + Swizzled(channel + 3, byte), b & kHighNibbles);
      }
    }
    const int i = threadIdx.x % kWarpgroupThreads;
    (i % 2 == 0 ? k_parameters : v_parameters)[i / 2] = UnpackF16(i / 2 < valid ? parameters : 0);
  }
};

template <int kHeadDim>
__device__ __forceinline__ void Produce(const PrefillParameters& p, Shared<kHeadDim>* shared) {
  constexpr int kHeadBytes = 64 * kHeadDim + 512;
  int stage = 0;
  uint32_t parity = 0;
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Tile tile = FindTile(p, index);
    if (tile.rows == 0) return;
    const int32_t* table = p.step.page_tables + static_cast<int64_t>(tile.sequence) * p.step.max_pages;
    const auto head_of = [&](int page) {
      return p.pages + (static_cast<int64_t>(CheckedPage(p.step, page)) * p.kv_heads + tile.kv_head) * kHeadBytes;
    };
    // The page after the one that is being unpacked is on its way, and the number of the one after that.
    PageOrder order(tile.pages()), following(tile.pages());
    following.Next();
    int next_page = following.done() ? 0 : __ldg(table + following.page());
    RawPage<kHeadDim> even, odd;
    even.Load(head_of(__ldg(table + order.page())));
    const auto produce = [&](const RawPage<kHeadDim>& raw, RawPage<kHeadDim>* next) {
      const int valid = tile.position + tile.rows - order.page() * kTokensPerPage;
      order.Next();
      if (!order.done()) {
        next->Load(head_of(next_page));
        following.Next();
        if (!following.done()) next_page = __ldg(table + following.page());
      }
      MbarrierWait(SharedAddress(&shared->empty[stage]), parity ^ 1);
      raw.Unpack(SharedAddress(shared->stages[stage].k), SharedAddress(shared->stages[stage].v), valid,
                 shared->k_parameters[stage], shared->v_parameters[stage]);
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&shared->full[stage]));
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    };
    while (true) {
      produce(even, &odd);
      if (order.done()) break;
      produce(odd, &even);
      if (order.done()) break;
    }
  }
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------

// What is folded, in memory: per thread a float4 per eight channels (registers 4j .. 4j + 3) and one per row's state. The
// threads of a warpgroup lie side by side.
template <int kHeadDim>
constexpr int kStoredFloat4 = kHeadDim / 8 + 2;

template <int kHeadDim>
__device__ __forceinline__ void Keep(const float (&o)[kHeadDim / 2], const SoftmaxState (&state)[2], float4* stored) {
#pragma unroll
  for (int r = 0; r < 2; ++r) stored[r * kWarpgroupThreads] = make_float4(state[r].max, state[r].sum, state[r].zero, 0);
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    stored[(2 + j) * kWarpgroupThreads] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
  }
}
// o, state = stored ⊕ o, state.
template <int kHeadDim>
__device__ __forceinline__ void FoldStored(const float4* stored, float (&o)[kHeadDim / 2], SoftmaxState (&state)[2]) {
  FoldFactors factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float4 s = stored[r * kWarpgroupThreads];
    SoftmaxState into = {s.x, s.y, s.z};
    factors[r] = Fold(&into, state[r]);
    state[r] = into;
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    const float4 s = stored[(2 + j) * kWarpgroupThreads];
    o[4 * j] = Fold(s.x, o[4 * j], factors[0]);
    o[4 * j + 1] = Fold(s.y, o[4 * j + 1], factors[0]);
    o[4 * j + 2] = Fold(s.z, o[4 * j + 2], factors[1]);
    o[4 * j + 3] = Fold(s.w, o[4 * j + 3], factors[1]);
  }
}

// A stream of 64 queries. Thread 32w + 4g + t holds rows 16w + g (registers 4j, 4j + 1: channels 8j + 2t and the next)
// and 16w + g + 8 (4j + 2, 4j + 3), and sums over tokens 2t and 2t + 1 modulo 8, like the lanes of decode.
template <int kHeadDim>
struct Stream {
  float o[kHeadDim / 2];
  float reference[2];
  float sum[2][2], zero[2][2];  // [row][token % 2]

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference[r] = -INFINITY;
      sum[r][0] = sum[r][1] = zero[r][0] = zero[r][1] = 0;
    }
  }
};

// Scale and zero of two tokens. Volatile: loads that the compiler moves far ahead cost registers that are not there.
__device__ __forceinline__ float4 LoadParameters(const float2* from) {
  const uint4 v = LoadShared128(SharedAddress(from));
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Scores of a page become probabilities times V's scale, as operands of P · V. last[r]: the last token of the page, from
// 0 on, that row r sees; negative: none.
template <int kHeadDim, bool kFull>
__device__ __forceinline__ void Softmax(float (&scores)[32], const float2* k_parameters, const float2* v_parameters,
                                        const int (&last)[2], const QueryFactors (&factors)[2],
                                        Stream<kHeadDim>* stream, uint32_t (&p)[4][4]) {
  const int t = threadIdx.x % 4;
  float page_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 k = LoadParameters(k_parameters + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, e = i % 2;
      float& score = scores[4 * j + i];
      score = Score(e == 0 ? k.x : k.z, e == 0 ? k.y : k.w, score, factors[r].sum);
      if (!kFull && 8 * j + 2 * t + e > last[r]) score = -INFINITY;
      page_max[r] = fmaxf(page_max[r], score);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    page_max[r] = fmaxf(page_max[r], __shfl_xor_sync(~0u, page_max[r], 1));
    page_max[r] = fmaxf(page_max[r], __shfl_xor_sync(~0u, page_max[r], 2));
  }
  if (__any_sync(~0u, ReferenceMoves(page_max[0], stream->reference[0], factors[0].score) ||
                          ReferenceMoves(page_max[1], stream->reference[1], factors[1].score))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = MoveReference(page_max[r], factors[r].score, &stream->reference[r]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        stream->sum[r][e] *= factor;
        stream->zero[r][e] *= factor;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) stream->o[4 * j + 2 * r + e] *= factor;
      }
    }
  }
  const float offset[2] = {ExponentOffset(stream->reference[0], factors[0].score),
                           ExponentOffset(stream->reference[1], factors[1].score)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // sixteen tokens: one step of P · V
    float weights[2][2][2];      // [token / 8][row][token % 2]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        weights[0][r][e] = Exp2(fmaf(scores[8 * i + 2 * r + e], factors[r].score, offset[r]));
        weights[1][r][e] = Exp2(fmaf(scores[8 * i + 4 + 2 * r + e], factors[r].score, offset[r]));
        stream->sum[r][e] += weights[0][r][e] + weights[1][r][e];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = 16 * i + 8 * half + 2 * t;
      const float4 v = LoadParameters(v_parameters + token);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float scaled[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scaled[e] = weights[half][r][e] * (e == 0 ? v.x : v.z);
          stream->zero[r][e] = fmaf(weights[half][r][e], e == 0 ? v.y : v.w, stream->zero[r][e]);
        }
        p[i][2 * half + r] = PackF16(scaled[0], scaled[1]);
      }
    }
  }
}

// dots = Q · K of a page, started.
template <int kHeadDim>
__device__ __forceinline__ void StartDots(uint64_t q, uint32_t stage_k, float (&dots)[32]) {
  const uint64_t k = WgmmaF16Descriptor(stage_k);
  WgmmaFence();
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    const int atom = s / 4 * (64 * kAtomBytes / 16) + s % 4 * 2;
    WgmmaF16(dots, q + atom, k + atom, s != 0);
  }
  WgmmaCommit();
}

// One page.
template <int kHeadDim, bool kFull>
__device__ __forceinline__ void AttendPage(uint64_t q, uint32_t stage_k, uint32_t stage_v, const float2* k_parameters,
                                           const float2* v_parameters, const int (&last)[2],
                                           const QueryFactors (&factors)[2], Stream<kHeadDim>* stream) {
  float dots[32];
  uint32_t weights[4][4];
  StartDots<kHeadDim>(q, stage_k, dots);
  WgmmaWait<0>();
  Softmax<kHeadDim, kFull>(dots, k_parameters, v_parameters, last, factors, stream, weights);
  const uint64_t v = WgmmaF16Descriptor(stage_v);
  WgmmaFence();
#pragma unroll
  for (int s = 0; s < 4; ++s) WgmmaF16(stream->o, weights[s], v + 2 * s, 1);
  WgmmaCommit();
  WgmmaWait<0>();
}

// The softmax of a finished stream: sums over all tokens in the order of the decode kernel's lanes.
template <int kHeadDim>
__device__ __forceinline__ void Finish(const Stream<kHeadDim>& stream, const QueryFactors (&factors)[2],
                                       SoftmaxState (&state)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = stream.sum[r][0] + stream.sum[r][1], zero = stream.zero[r][0] + stream.zero[r][1];
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      sum += __shfl_xor_sync(~0u, sum, lanes);
      zero += __shfl_xor_sync(~0u, zero, lanes);
    }
    state[r] = {stream.reference[r] * factors[r].score, sum, zero};
  }
}

__device__ __forceinline__ void WarpgroupBarrier(int consumer) {
  if (consumer == 0) {
    asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroupThreads) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(kWarpgroupThreads) : "memory");
  }
}

// The warpgroup's 64 queries into shared memory, in the order of K's channels.
template <int kHeadDim>
__device__ __forceinline__ void PrepareQueries(const PrefillParameters& p, const Tile& tile, int consumer,
                                               Shared<kHeadDim>* shared) {
  constexpr int kLanes = kHeadDim / 8, kWords = kHeadDim / 32;
  const int thread = threadIdx.x % kWarpgroupThreads, channels = thread % kLanes;
  const uint32_t q = SharedAddress(shared->q[consumer]);
  for (int query = thread / kLanes; query < 64; query += kWarpgroupThreads / kLanes) {
    const int pair = 64 * consumer + query, row = pair / p.group, head = tile.kv_head * p.group + pair % p.group;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (row < tile.rows) {
      raw = __ldcg(reinterpret_cast<const uint4*>(p.q + (tile.row + row) * p.q_stride + head * kHeadDim + 8 * channels));
    }
    QueryFactors factors;
    const uint4 words = PrepareQuery<kHeadDim>(raw, p.scale_log2e, &factors);
    const int byte = 64 * (channels % kWords) + 8 * (channels / kWords);
    const uint32_t atom = q + byte / kAtomBytes * (64 * kAtomBytes);
    StoreShared64(atom + Swizzled(query, byte % kAtomBytes), words.x, words.y);
    StoreShared64(atom + Swizzled(query, byte % kAtomBytes + 32), words.z, words.w);
    if (channels == 0) shared->factors[consumer][query] = factors;
  }
  FenceProxyAsync();
}

template <int kHeadDim>
__device__ __forceinline__ void Consume(const PrefillParameters& p, int consumer, Shared<kHeadDim>* shared) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32, t = lane % 4;
  const int query[2] = {thread / 32 * 16 + lane / 4, thread / 32 * 16 + lane / 4 + 8};
  constexpr int kStored = kStoredFloat4<kHeadDim> * kWarpgroupThreads;
  float4* chunk_store = &shared->chunks[consumer][0][thread];
  // Level 0: what is folded over the chunks of a group; 1: over groups. Rarely used, so not kept in a register.
  const auto folded = [&](int level) {
    return p.folded + ((static_cast<int64_t>(blockIdx.x) * kConsumers + consumer) * 2 + level) * kStored + thread;
  };
  int stage = 0;
  uint32_t parity = 0;
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Tile tile = FindTile(p, index);
    if (tile.rows == 0) return;
    PrepareQueries<kHeadDim>(p, tile, consumer, shared);
    WarpgroupBarrier(consumer);
    const auto last_of = [&](int in_warpgroup) {  // position of a query
      return tile.position + min((64 * consumer + in_warpgroup) / p.group, tile.rows - 1);
    };
    const int first_last = last_of(0);

    SoftmaxState state[2];
    Stream<kHeadDim> stream;
    stream.Clear();
    const uint64_t q = WgmmaF16Descriptor(SharedAddress(shared->q[consumer]));
    for (PageOrder order(tile.pages());; order.Next()) {
      MbarrierWait(SharedAddress(&shared->full[stage]), parity);
      const bool context_ends = order.page_is_last();
      const uint32_t k = SharedAddress(shared->stages[stage].k), v = SharedAddress(shared->stages[stage].v);
      const int first_token = order.page() * kTokensPerPage;
      const QueryFactors factors[2] = {shared->factors[consumer][query[0]], shared->factors[consumer][query[1]]};
      if (first_token + kTokensPerPage - 1 <= first_last) {
        AttendPage<kHeadDim, true>(q, k, v, shared->k_parameters[stage], shared->v_parameters[stage], {}, factors,
                                   &stream);
      } else {
        const int last[2] = {last_of(query[0]) - first_token, last_of(query[1]) - first_token};
        AttendPage<kHeadDim, false>(q, k, v, shared->k_parameters[stage], shared->v_parameters[stage], last, factors,
                                    &stream);
      }
      if (lane == 0) MbarrierArrive(SharedAddress(&shared->empty[stage]));
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
      if (!order.stream_ends()) continue;
      Finish(stream, factors, state);
      if (order.stream != 0) FoldStored<kHeadDim>(chunk_store, stream.o, state);
      if (!order.chunk_ends()) {
        Keep<kHeadDim>(stream.o, state, chunk_store);
        stream.Clear();
        continue;
      }
      if (order.chunk % kGroupChunks != 0) FoldStored<kHeadDim>(folded(0), stream.o, state);
      if ((order.chunk + 1) % kGroupChunks != 0 && !context_ends) {
        Keep<kHeadDim>(stream.o, state, folded(0));
        stream.Clear();
        continue;
      }
      if (order.chunk >= kGroupChunks) FoldStored<kHeadDim>(folded(1), stream.o, state);
      if (context_ends) break;
      Keep<kHeadDim>(stream.o, state, folded(1));
      stream.Clear();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int pair = 64 * consumer + query[r], row = pair / p.group;
      if (row >= tile.rows) continue;
      const float inverse = 1.0f / state[r].sum, zero = state[r].zero;
      __nv_bfloat16* out = p.out + (tile.row + row) * p.out_stride +
                           (tile.kv_head * p.group + pair % p.group) * kHeadDim + 2 * t;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + 8 * j) =
            PackBf16(Output(stream.o[4 * j + 2 * r], kLowNibbleUnit, zero, inverse),
                     Output(stream.o[4 * j + 2 * r + 1], kHighNibbleUnit, zero, inverse));
      }
    }
    // Queries of the next tile overwrite this tile's: after every warp has read its factors, and the asynchronous
    // reads of Q have been waited for.
    WarpgroupBarrier(consumer);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ PrefillParameters p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared<kHeadDim>* shared = reinterpret_cast<Shared<kHeadDim>*>(shared_bytes);
  GridDependencyLaunch();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      MbarrierInit(SharedAddress(&shared->full[i]), kWarpgroupThreads);
      MbarrierInit(SharedAddress(&shared->empty[i]), kConsumers * 4);
    }
    MbarrierInitFence();
  }
  __syncthreads();
  GridDependencyWait();
  // The shuffle tells the compiler that it is uniform: else it does not use the registers that follow.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    Produce<kHeadDim>(p, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Consume<kHeadDim>(p, warpgroup - 1, shared);
  }
}

template <int kHeadDim>
void LaunchPrefill(const Device& device, const AttentionArgs& args) {
  const int64_t kv_heads = args.pages.layout.kv_heads, group = args.q_heads / kv_heads;
  const int64_t tile_rows = kTileQueries / group;
  const PrefillParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .pages = args.pages.data,
      .q = static_cast<const __nv_bfloat16*>(args.qkv.data),
      .out = static_cast<__nv_bfloat16*>(args.out.data),
      .q_stride = args.qkv.cols,
      .out_stride = args.out.cols,
      .kv_heads = static_cast<int>(kv_heads),
      .group = static_cast<int>(group),
      .tile_rows = static_cast<int>(tile_rows),
      .scale_log2e = args.scale * 1.4426950408889634f,
      .folded = device.Scratch<float4>(PrefillScratchBytes(device.multiprocessors, kHeadDim)),
  };
  constexpr int kSharedBytes = sizeof(Shared<kHeadDim>);
  AllowSharedMemory(PrefillKernel<kHeadDim>, kSharedBytes);
  const int64_t most_tiles = (args.step.rows / tile_rows + args.step.sequences) * kv_heads;
  const int64_t blocks = most_tiles < device.multiprocessors ? most_tiles : device.multiprocessors;
  Launch(device, PrefillKernel<kHeadDim>, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), kSharedBytes, parameters);
}

}  // namespace

int64_t PrefillScratchBytes(int multiprocessors, int64_t head_dim) {
  return int64_t{multiprocessors} * kConsumers * 2 * (head_dim / 8 + 2) * kWarpgroupThreads *
         static_cast<int64_t>(sizeof(float4));
}

void PrefillAttention(const Device& device, const AttentionArgs& args) {
  if (args.pages.layout.head_dim == 128) {
    LaunchPrefill<128>(device, args);
  } else {
    LaunchPrefill<64>(device, args);
  }
}

}  // namespace nibble::cuda
