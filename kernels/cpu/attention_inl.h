// RoPE and attention.
//
// A row's arithmetic, the same in a decode step and in a prefill chunk: pages in order; per page, each score is one
// chain of fused multiply-adds over d (a token per lane), the softmax is rescaled once to the running maximum (online
// softmax, Milakov & Gimelshein, arXiv 1805.02867), and each output channel is one chain over the page's tokens. Scale
// and zero of KV4 are applied to scores and probabilities, so the inner loops see the small integers of the codes.
#pragma once

#include "kernels/cpu/kv_pages_inl.h"
#include "kernels/cpu/math_inl.h"
#include "kernels/cpu/rows_inl.h"

namespace nibble::NIBBLE_ISA {

inline int64_t PageId(const StepRows& step, int64_t sequence, int64_t index, int64_t num_pages) {
  NIBBLE_CHECK(index < step.max_pages,
               "page index " + std::to_string(index) + " of " + std::to_string(step.max_pages) + " max_pages");
  const int64_t page = step.page_tables[sequence * step.max_pages + index];
  NIBBLE_CHECK(page >= 0 && page < num_pages,
               "page id " + std::to_string(page) + " of " + std::to_string(num_pages) + " pages");
  return page;
}

// ---- RopeAppend ----------------------------------------------------------------------------------------------------

// Pairs (d, d + D/2): lo' = lo·cos − hi·sin, hi' = hi·cos + lo·sin.
inline void Rotate(float* x, const float* cos_sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Vec lo = Vec::Load(x + i), hi = Vec::Load(x + half + i);
    const Vec c = Vec::Load(cos_sin + i), s = Vec::Load(cos_sin + half + i);
    Fma(lo, c, Vec::Zero() - hi * s).Store(x + i);
    Fma(hi, c, lo * s).Store(x + half + i);
  }
}

// f16 with saturation: a finite value stays finite.
inline F16 SaturatedF16(float x) { return ToF16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x); }

// One token's K or V of one head into its slot of the page.
inline void AppendKv4(const float* x, int64_t d, int64_t token, const HeadView& to) {
  Vec high = Vec::Load(x), low = high;
  for (int64_t i = kLanes; i < d; i += kLanes) {
    high = Max(Vec::Load(x + i), high);
    low = Min(Vec::Load(x + i), low);
  }
  const float minimum = -ReduceMax(Vec::Zero() - low);
  const F16 scale = SaturatedF16((ReduceMax(high) - minimum) / 15.0f);
  const F16 zero = SaturatedF16(minimum);
  to.scale[token] = scale;
  to.zero[token] = zero;
  uint8_t* bytes = to.codes + token * d / 2;
  if ((scale.bits & 0x7fff) == 0) {
    std::memset(bytes, 0, d / 2);
    return;
  }
  const Vec s = Vec::Set(ToFloat(scale)), z = Vec::Set(ToFloat(zero));
  for (int64_t i = 0; i < d; i += kLanes) {
    const Vec q = RoundEven((Vec::Load(x + i) - z) / s);
    int8_t codes[kLanes];
    ToInt(Min(Vec::Set(15.0f), Max(q, Vec::Zero()))).StoreI8(codes);
    for (int64_t j = 0; j < kLanes / 2; ++j) {
      bytes[i / 2 + j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
    }
  }
}

void RopeAppend(const RopeAppendArgs& args, int64_t row, Scratch*) {
  const KvLayout& layout = args.pages.layout;
  const int64_t d = layout.head_dim;
  const int64_t position = args.step.positions[row];
  NIBBLE_CHECK(position >= 0 && position < args.max_positions,
               "position " + std::to_string(position) + " of " + std::to_string(args.max_positions) + " positions");
  const float* cos_sin = args.cos_sin + position * d;
  alignas(64) float x[kMaxHeadDim];
  for (int64_t h = 0; h < args.q_heads; ++h) {
    LoadValues(args.qkv, row, h * d, d, x);
    Rotate(x, cos_sin, d);
    StoreRow(x, args.qkv, row, h * d, d);
  }
  const int64_t page = PageId(args.step, args.step.row_sequence[row], position / kPageTokens, args.pages.num_pages);
  const int64_t token = position % kPageTokens;
  for (int64_t h = 0; h < 2 * layout.kv_heads; ++h) {
    const bool value = h >= layout.kv_heads;
    LoadValues(args.qkv, row, (args.q_heads + h) * d, d, x);
    if (!value) Rotate(x, cos_sin, d);
    const HeadView to = KeyView(args.pages, page, value ? h - layout.kv_heads : h, value);
    if (layout.format == KvFormat::kKV4) {
      AppendKv4(x, d, token, to);
    } else {
      std::memcpy(to.floats + token * d, x, d * sizeof(float));
    }
  }
}

// ---- Attention -----------------------------------------------------------------------------------------------------

// Running softmax of one (row, query head).
struct HeadState {
  float max;
  float q_sum;
  Vec sum;         // lane j: Σ of the probabilities of tokens j, j + 16, ... of every page
  float zero_sum;  // Σ probability · v_zero
};

// kHeads query heads of one row (they share its context length) over tokens [0, count) of a page.
template <int kHeads, typename Page>
inline void AttendPage(const Page& page, bool kv4, int64_t d, int64_t count, const float* q, HeadState* state,
                       float* out) {
  Vec dots[kHeads][kPageVecs];
  const int64_t vecs = CeilDiv(count, kLanes);
  page.template Score<kHeads>(q, d, vecs, dots[0]);
  alignas(64) float p[kHeads][kPageTokens];
  float rescale[kHeads];
  const Vec minus_infinity = Vec::Set(-std::numeric_limits<float>::infinity());
  for (int r = 0; r < kHeads; ++r) {
    HeadState& s = state[r];
    Vec high = minus_infinity;
    for (int64_t j = 0; j < vecs; ++j) {
      Vec score = dots[r][j];
      if (kv4) {
        score =
            Fma(Vec::Load(page.k_zero + j * kLanes), Vec::Set(s.q_sum), score * Vec::Load(page.k_scale + j * kLanes));
      }
      // Lanes past the row's own position hold whatever the page held: out, whatever they are.
      const Vec token = ToFloat(IVec::Iota() + IVec::Set(static_cast<int32_t>(j * kLanes)));
      score = SelectLess(token, Vec::Set(static_cast<float>(count)), score, minus_infinity);
      dots[r][j] = score;
      high = Max(score, high);
    }
    const float page_max = ReduceMax(high);
    const float new_max = page_max > s.max ? page_max : s.max;
    // All scores -inf so far (a broken model): subtract 0, not -inf, and the row becomes 0/0, not a crash.
    const float base = new_max == -std::numeric_limits<float>::infinity() ? 0.0f : new_max;
    rescale[r] = Exp(s.max - base);
    s.max = new_max;
    Vec sum = s.sum * Vec::Set(rescale[r]);
    Vec zero_sum = Vec::Zero();
    for (int64_t j = 0; j < vecs; ++j) {
      const Vec probability = Exp(dots[r][j] - Vec::Set(base));
      sum = sum + probability;
      if (kv4) {
        const Vec token = ToFloat(IVec::Iota() + IVec::Set(static_cast<int32_t>(j * kLanes)));
        const Vec inside = Vec::Set(static_cast<float>(count));
        zero_sum =
            Fma(probability, SelectLess(token, inside, Vec::Load(page.v_zero + j * kLanes), Vec::Zero()), zero_sum);
        (probability * Vec::Load(page.v_scale + j * kLanes)).Store(p[r] + j * kLanes);
      } else {
        probability.Store(p[r] + j * kLanes);
      }
    }
    s.sum = sum;
    s.zero_sum = std::fma(s.zero_sum, rescale[r], ReduceAdd(zero_sum));
  }
  page.template Mix<kHeads>(p, rescale, d, count, out);
}

// All query heads of one row that share the KV head.
template <typename Page>
inline void AttendGroup(const Page& page, bool kv4, int64_t d, int64_t count, int64_t group, const float* q,
                        HeadState* state, float* out) {
  for (int64_t h = 0; h < group;) {
    if (group - h >= 4) {
      if constexpr (Page::kMostHeads >= 4) AttendPage<4>(page, kv4, d, count, q + h * d, state + h, out + h * d);
      h += 4;
    } else if (group - h >= 2) {
      AttendPage<2>(page, kv4, d, count, q + h * d, state + h, out + h * d);
      h += 2;
    } else {
      AttendPage<1>(page, kv4, d, count, q + h * d, state + h, out + h * d);
      h += 1;
    }
  }
}

void Attention(const AttentionArgs& args, int64_t row_begin, int64_t row_end, int64_t kv_head, Scratch* scratch) {
  const KvLayout& layout = args.pages.layout;
  const bool kv4 = layout.format == KvFormat::kKV4;
  const int64_t d = layout.head_dim;
  const int64_t group = args.q_heads / layout.kv_heads;
  const int64_t rows = row_end - row_begin;
  const int64_t sequence = args.step.row_sequence[row_begin];
  const int64_t last = args.step.positions[row_end - 1];

  // One row whose heads are worked on together uses every code once.
  const bool packed = kv4 && rows == 1 && group != 3 && group <= 4 && group <= PackedPage::kMostHeads;

  // Scratch: K and V of a page, then q, output and softmax state of every (row, head).
  const int64_t heads = rows * group;
  const int64_t floats = 2 * kPageTokens * d + 2 * heads * d;
  float* memory = static_cast<float*>(scratch->Reserve(floats * sizeof(float) + heads * sizeof(HeadState)));
  UnpackedPage page;
  page.k = memory;
  page.v = memory + kPageTokens * d;
  float* own_v = page.v;
  float* q = memory + 2 * kPageTokens * d;
  float* out = q + heads * d;
  HeadState* state = reinterpret_cast<HeadState*>(memory + floats);
  for (int64_t i = 0; i < heads; ++i) {
    LoadValues(args.qkv, row_begin + i / group, (kv_head * group + i % group) * d, d, q + i * d);
    Vec q_sum = Vec::Zero();
    for (int64_t c = 0; c < d; c += kLanes) {
      const Vec scaled = Vec::Load(q + i * d + c) * Vec::Set(args.scale);
      scaled.Store(q + i * d + c);
      q_sum = q_sum + scaled;
      Vec::Zero().Store(out + i * d + c);
    }
    state[i] = {-std::numeric_limits<float>::infinity(), ReduceAdd(q_sum), Vec::Zero(), 0.0f};
  }

  for (int64_t first = 0; first <= last; first += kPageTokens) {
    const int64_t id = PageId(args.step, sequence, first / kPageTokens, args.pages.num_pages);
    const HeadView key = KeyView(args.pages, id, kv_head, false), value = KeyView(args.pages, id, kv_head, true);
    const int64_t filled = last + 1 - first < kPageTokens ? last + 1 - first : kPageTokens;
    if (packed) {
      PackedPage codes;
      codes.k = key.codes;
      codes.v = value.codes;
      codes.Load(key, value, filled);
      AttendGroup(codes, kv4, d, filled, group, q, state, out);
      continue;
    }
    page.v = own_v;
    if (kv4) {
      UnpackKv4(key, value, d, filled, &page);
      page.Load(key, value, filled);
    } else {
      UnpackF32(key, value, d, filled, &page);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t context = args.step.positions[row_begin + r] + 1 - first;
      if (context <= 0) continue;
      const int64_t count = context < kPageTokens ? context : kPageTokens;
      AttendGroup(page, kv4, d, count, group, q + r * group * d, state + r * group, out + r * group * d);
    }
  }

  alignas(64) float result[kMaxHeadDim];
  for (int64_t i = 0; i < heads; ++i) {
    const float inverse = 1.0f / ReduceAdd(state[i].sum);
    for (int64_t c = 0; c < d; ++c) {
      const float o = out[i * d + c];
      result[VOrder(layout.format, c)] = (kv4 ? o + state[i].zero_sum : o) * inverse;
    }
    StoreRow(result, args.out, row_begin + i / group, (kv_head * group + i % group) * d, d);
  }
}

}  // namespace nibble::NIBBLE_ISA
