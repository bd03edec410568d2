// THE page to read: everything a backend does for a transformer layer. The CPU backend (kernels/cpu) is the readable
// specification; docs/numerics.md is normative for formats. A CUDA backend conforms to both.
//
// Dimension letters:  T rows (tokens) of a step · S sequences · H hidden · F feed-forward · K input and N output
// features of a linear · V vocabulary · D head size · Hq, Hkv query and KV heads of this shard · P pages.
// All pointers are device pointers (host pointers on the CPU backend) unless they say "host". Rows are contiguous,
// row-major. Operators are issued in order on one stream and are valid after Synchronize().
//
// One arithmetic: the bits of an output row depend on that row's inputs alone, never on T, on other rows or on how
// a sequence was cut into steps.
//
// Arguments are validated once, in ops.cc; a violation is a bug and aborts with the values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/float16.h"

namespace nibble {

inline constexpr int64_t kBlock = 128;       // channels of one activation block and of one weight group
inline constexpr int64_t kPageTokens = 64;   // tokens of one KV page
inline constexpr int64_t kMaxTopLogprobs = 20;
inline constexpr int64_t kHeadDimMultiple = 32;  // head_dim is a multiple of this,
inline constexpr int64_t kMaxHeadDim = 256;      // and at most this

// Type of activations between operators. Quantized checkpoints run in bf16; the unquantized reference runs in f32.
enum class DType : uint8_t { kBF16, kF32 };
inline constexpr int64_t SizeOf(DType t) { return t == DType::kBF16 ? 2 : 4; }

// [rows, cols] activations.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kBF16;
  int64_t rows = 0;
  int64_t cols = 0;
};

// ---- linear layers -------------------------------------------------------------------------------------------------

// How the input of a linear is coded. Static, from the checkpoint.
struct InputCoding {
  int64_t k = 0;
  bool quantized = false;               // false: the linear takes dense rows (unquantized checkpoint, lm_head)
  const uint8_t* block_bits = nullptr;  // [K/128], 4 or 8
  const int32_t* perm = nullptr;        // [K] or null: code i is made from input channel perm[i]
  int64_t hadamard = 0;                 // 0, or size of the orthonormal block-Hadamard applied before perm (power of 2)
};

// Input of a linear: dense rows, or int8 codes with x[t,k] ≈ scales[t] · codes[t,k].
struct LinearInput {
  int64_t rows = 0;                 // T
  int64_t k = 0;
  Rows dense;                       // used iff codes is null
  int8_t* codes = nullptr;          // [T, K]
  float* scales = nullptr;          // [T]
  int32_t* code_sums = nullptr;     // [T] Σ_k codes[t,k], for unsigned weights; null: not wanted, but Linear does
  uint8_t* exponents = nullptr;     // [T, K/128] shared exponents of 4-bit blocks, 0 for 8-bit ones; null: not wanted
};

// A weight [N, K] in the backend's own order.
class Weight {
 public:
  virtual ~Weight() = default;
  int64_t n = 0;
  int64_t k = 0;
  int64_t bytes = 0;
};

// Logical (checkpoint-order, host memory) two-level 4-bit weight of one projection; see docs/numerics.md.
struct W4View {
  int64_t n = 0;
  int64_t k = 0;                          // multiple of 128
  const uint8_t* qweight = nullptr;       // [N, K/2], low nibble = even k
  const uint8_t* group_scale = nullptr;   // [N, K/128], 1..16
  const int8_t* group_min = nullptr;      // [N, K/128], -119..127, also after adding 15 scales
  const float* channel_scale = nullptr;   // [N]
  // [K/128] InputCoding::block_bits of the input, equal for projections that are stacked: inputs then always come with
  // exponents, for backends that multiply in 4 bits. Null: no block is 4-bit.
  const uint8_t* block_bits = nullptr;
};
// Logical dense weight of one projection, host memory.
struct DenseView {
  int64_t n = 0;
  int64_t k = 0;
  const BF16* data = nullptr;             // [N, K]
};

// y[t,n] = scales[t] · channel_scale[n] · Σ_k codes[t,k] · w8[n,k] (+ bias[n]), the sum exact in int32; or the f32 dot
// product of dense rows with a dense weight. One rounding to out.dtype.
struct LinearArgs {
  LinearInput input;                 // [T, K]
  const Weight* weight = nullptr;    // [N, K]
  const float* bias = nullptr;       // [N] or null
  Rows out;                          // [T, N]
};

// out = input rows coded for the next linear: hadamard, permute, quantize (or a plain copy when not quantized).
struct QuantizeArgs {
  Rows in;                           // [T, K]
  const InputCoding* coding = nullptr;
  LinearInput* out = nullptr;        // rows, k and buffers set by the caller
};

// residual += delta (rounded to residual.dtype); y = (residual · weight) · rsqrt(mean(residual²) + eps); out = coded y.
struct AddNormQuantizeArgs {
  Rows residual;                     // [T, H], updated in place
  const Rows* delta = nullptr;       // [T, H] or null
  const BF16* weight = nullptr;      // [H]
  float eps = 0;
  const int32_t* row_index = nullptr;  // null, or [out.rows]: out row i is residual row row_index[i] (delta still
                                       // goes to every residual row)
  const InputCoding* coding = nullptr;
  LinearInput* out = nullptr;
};

// h = silu(gate) · up, rounded to the input's dtype; out = coded h. Input columns: gate [0, F), up [F, 2F).
struct SiluMulQuantizeArgs {
  Rows gate_up;                      // [T, 2F]
  const InputCoding* coding = nullptr;
  LinearInput* out = nullptr;        // [T, F]
};

// ---- the rows of a step --------------------------------------------------------------------------------------------

// out[t] = table[id], id = token_ids[t], or slot_tokens[~token_ids[t]] when negative (newest token of a slot).
struct EmbedArgs {
  const int32_t* token_ids = nullptr;    // [T]
  const int32_t* slot_tokens = nullptr;  // [slots]
  const BF16* table = nullptr;           // [V, H]
  int64_t vocab = 0;
  Rows out;                              // [T, H]
};

// Which rows belong to which sequence. Rows of a sequence are consecutive rows at consecutive positions.
struct StepRows {
  bool operator==(const StepRows&) const = default;

  int64_t rows = 0;                        // T
  int64_t sequences = 0;                   // S
  const int32_t* positions = nullptr;      // [T]
  const int32_t* row_sequence = nullptr;   // [T] → 0..S-1
  const int32_t* row_begin = nullptr;      // [S+1]
  const int32_t* page_tables = nullptr;    // [S, max_pages] page ids; entries past the context are not read
  int64_t max_pages = 0;
};

// ---- KV cache ------------------------------------------------------------------------------------------------------

enum class KvFormat : uint8_t { kKV4, kF32 };  // kF32: the unquantized reference

// One layer's pages: [P, Hkv, head_bytes]. Inside (page, head), KV4: K codes [64, D/2] u8 (low nibble = even d),
// K scale f16 [64], K zero f16 [64], then the same for V. F32: K [64, D], V [64, D].
struct KvLayout {
  bool operator==(const KvLayout&) const = default;

  KvFormat format = KvFormat::kKV4;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_bytes() const {
    return format == KvFormat::kKV4 ? 2 * kPageTokens * (head_dim / 2 + 4) : 2 * kPageTokens * head_dim * 4;
  }
  int64_t page_bytes() const { return kv_heads * head_bytes(); }
};
struct KvPages {
  uint8_t* data = nullptr;
  int64_t num_pages = 0;
  KvLayout layout;
};

// What the attention of every layer of a step has in common, so that a backend divides the work once and not per layer.
struct BeginStepArgs {
  StepRows step;
  int64_t q_heads = 0;
  KvLayout layout;
};

// Rotates q and k (Llama rotate-half pairs d, d + D/2), q in place, and writes k and v of every row into its page.
struct RopeAppendArgs {
  StepRows step;
  Rows qkv;                           // [T, (Hq + 2·Hkv)·D]: q heads, k heads, v heads
  int64_t q_heads = 0;
  const float* cos_sin = nullptr;     // [max_positions, D]: D/2 cosines, then D/2 sines
  int64_t max_positions = 0;
  KvPages pages;
};

// Causal grouped-query attention of every row over its sequence's pages (its own row included; RopeAppend came first).
struct AttentionArgs {
  StepRows step;                      // that of the last BeginStep, as q_heads and pages.layout are
  Rows qkv;                           // q rotated
  int64_t q_heads = 0;
  KvPages pages;
  float scale = 0;                    // 1/sqrt(D)
  Rows out;                           // [T, Hq·D]
};

// ---- sampling ------------------------------------------------------------------------------------------------------

// One row to sample (or to score). Plain data, uploaded as it is.
struct SampleRow {
  float temperature = 0;              // 0 = greedy
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint64_t seed = 0;
  int32_t position = 0;               // of the token being chosen, in its sequence
  int32_t top_k = 0;                  // 0 = off
  int32_t slot = -1;                  // slot_tokens[slot] receives the token; -1: nowhere
  int32_t target = -1;                // ≥ 0: do not sample, score this token (no penalties, no temperature)
  int32_t history = -1;               // row of SampleArgs::history, or -1 when no penalty is active
  int32_t num_logprobs = -1;          // -1 none, 0 the token's own, k ≤ 20 the k best as well
  int32_t bias_begin = 0, bias_end = 0;          // range in bias_ids / bias_values
  int32_t suppress_begin = 0, suppress_end = 0;  // range in suppress_ids: these ids cannot be chosen
};

// Order: bias, suppression, penalties, temperature, top-k, top-p, min-p, then the Gumbel-max draw from Philox(seed,
// position, id). Ties go to the smaller id. Log-probabilities are of the raw logits (log-softmax before any of it),
// like vLLM's default.
struct SampleArgs {
  const float* logits = nullptr;       // [rows, V]
  int64_t rows = 0;
  int64_t vocab = 0;
  const SampleRow* params = nullptr;   // [rows]
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const int32_t* suppress_ids = nullptr;
  uint16_t* history = nullptr;         // [history rows, V]: bit 15 = in the prompt, low 15 bits = times in the output;
                                       // the chosen token is counted
  int32_t* slot_tokens = nullptr;      // [slots]
  int32_t* token_ids = nullptr;        // [rows] out
  float* logprobs = nullptr;           // [rows] out, of the token; rows with num_logprobs ≥ 0
  int32_t* top_ids = nullptr;          // [rows, 20] out, best first
  float* top_logprobs = nullptr;       // [rows, 20] out
};

// Resets one history row and counts known tokens in it (first num_prompt of them as prompt).
struct RecordHistoryArgs {
  uint16_t* history = nullptr;         // [V], this sequence's row
  int64_t vocab = 0;
  const int32_t* token_ids = nullptr;  // [count]
  int64_t count = 0;
  int64_t num_prompt = 0;
};

// ---- the backend ---------------------------------------------------------------------------------------------------

// Device memory, freed with the object. Must not outlive its Ops.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, size_t bytes, void (*free)(void*)) : data_(data), bytes_(bytes), free_(free) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  void (*free_)(void*) = nullptr;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // For people: "cpu: 2 threads, avx512vnni".
  virtual std::string Describe() const = 0;

  // Memory. Allocate returns zeroed, 64-byte aligned memory or RESOURCE_EXHAUSTED with the size.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  virtual void Upload(void* to, const void* host_from, size_t bytes) = 0;
  virtual void Download(void* host_to, const void* from, size_t bytes) = 0;  // waits for the operators before it
  virtual absl::Status Synchronize() = 0;

  // Weights of several projections of equal K, stacked along N (q, k, v; gate, up), in the backend's order.
  // INVALID_ARGUMENT for a quantized K or group outside docs/numerics.md's range, RESOURCE_EXHAUSTED without memory.
  absl::StatusOr<std::unique_ptr<Weight>> PackW4(std::span<const W4View> parts);
  absl::StatusOr<std::unique_ptr<Weight>> PackDense(std::span<const DenseView> parts);

  void BeginStep(const BeginStepArgs& args);
  void Embed(const EmbedArgs& args);
  void AddNormQuantize(const AddNormQuantizeArgs& args);
  void Quantize(const QuantizeArgs& args);
  void SiluMulQuantize(const SiluMulQuantizeArgs& args);
  void Linear(const LinearArgs& args);
  void RopeAppend(const RopeAppendArgs& args);
  void Attention(const AttentionArgs& args);
  void RecordHistory(const RecordHistoryArgs& args);
  void Sample(const SampleArgs& args);

 protected:
  virtual absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) = 0;
  virtual absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) = 0;
  virtual void DoBeginStep(const BeginStepArgs& args) = 0;
  virtual void DoEmbed(const EmbedArgs& args) = 0;
  virtual void DoAddNormQuantize(const AddNormQuantizeArgs& args) = 0;
  virtual void DoQuantize(const QuantizeArgs& args) = 0;
  virtual void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) = 0;
  virtual void DoLinear(const LinearArgs& args) = 0;
  virtual void DoRopeAppend(const RopeAppendArgs& args) = 0;
  virtual void DoAttention(const AttentionArgs& args) = 0;
  virtual void DoRecordHistory(const RecordHistoryArgs& args) = 0;
  virtual void DoSample(const SampleArgs& args) = 0;

 private:
  BeginStepArgs begun_;  // the last BeginStep's
};

struct OpsOptions {
  std::string backend = "cpu";   // "cpu" or "cuda"
  int threads = 1;               // CPU: threads of this rank (the caller's thread included)
  int device = 0;                // CUDA device ordinal
};

// One of the two places that ask which devices exist. INVALID_ARGUMENT for an unknown backend, UNAVAILABLE for one
// this build or machine lacks.
absl::StatusOr<std::unique_ptr<Ops>> CreateOps(const OpsOptions& options);

}  // namespace nibble
