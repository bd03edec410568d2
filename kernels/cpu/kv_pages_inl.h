// KV pages as attention reads them: where things lie, and the two inner loops (scores of a page's tokens, the mix of
// its values) over a page that was unpacked for many rows, and over codes as they lie, for few.
#pragma once

#include "kernels/cpu/math_inl.h"

namespace nibble::NIBBLE_ISA {

// Where things lie inside the bytes of (page, head); see KvLayout.
struct HeadView {
  uint8_t* codes;  // [64, D/2]
  F16* scale;      // [64]
  F16* zero;       // [64]
  float* floats;   // [64, D]
};
inline HeadView KeyView(const KvPages& pages, int64_t page, int64_t head, bool value) {
  const KvLayout& layout = pages.layout;
  uint8_t* half =
      pages.data + page * layout.page_bytes() + head * layout.head_bytes() + (value ? layout.head_bytes() / 2 : 0);
  const int64_t code_bytes = kPageTokens * layout.head_dim / 2;
  return {half, reinterpret_cast<F16*>(half + code_bytes), reinterpret_cast<F16*>(half + code_bytes) + kPageTokens,
          reinterpret_cast<float*>(half)};
}

// One (page, KV head) as AttendPage reads it. K: a token per lane. V: a channel per lane, in the order that unpacking
// yields (VOrder).
struct PageScales {
  alignas(64) float k_scale[kPageTokens];
  alignas(64) float k_zero[kPageTokens];
  alignas(64) float v_scale[kPageTokens];
  alignas(64) float v_zero[kPageTokens];

  void Load(const HeadView& key, const HeadView& value, int64_t count) {
    for (int64_t token = 0; token < count; token += kLanes) {
      Vec::LoadF16(key.scale + token).Store(k_scale + token);
      Vec::LoadF16(key.zero + token).Store(k_zero + token);
      Vec::LoadF16(value.scale + token).Store(v_scale + token);
      Vec::LoadF16(value.zero + token).Store(v_zero + token);
    }
  }
};

// KV4's v holds, for each 32 channels, the even ones and then the odd ones.
inline int64_t VOrder(KvFormat format, int64_t i) {
  return format == KvFormat::kF32 ? i : i / 32 * 32 + (i % 16) * 2 + i % 32 / 16;
}

inline constexpr int64_t kPageVecs = kPageTokens / kLanes;

// Vectors of tokens or channels that kHeads query heads work on at a time, so that their sums stay in registers.
template <int kHeads, int kMost>
inline constexpr int kVecsAtOnce = kAttentionSums / kHeads < kMost ? kAttentionSums / kHeads : kMost;

// dots [kHeads, kPageVecs]: lanes = Σ_d q[r][d] · k[d][token], for 16 · kVecs tokens.
template <int kHeads, int kVecs>
inline void ScoreBlock(const float* q, int64_t d, const float* k, Vec* dots) {
  Vec sum[kHeads][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Vec::Zero();
  }
  for (int64_t i = 0; i < d; ++i) {
    Vec key[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) key[j] = Vec::Load(k + i * kPageTokens + j * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kHeads; ++r) {
      const Vec query = Vec::Set(q[r * d + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] = Fma(query, key[j], sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) dots[r * kPageVecs + j] = sum[r][j];
  }
}

// The same for `vecs` vectors of tokens, kVecs at a time while there are as many.
template <int kHeads, int kVecs>
inline void ScoreVecs(const float* q, int64_t d, const float* k, int64_t vecs, Vec* dots) {
  int64_t j = 0;
  for (; j + kVecs <= vecs; j += kVecs) ScoreBlock<kHeads, kVecs>(q, d, k + j * kLanes, dots + j);
  if constexpr (kVecs > 1) {
    if (j < vecs) ScoreVecs<kHeads, kVecs - 1>(q, d, k + j * kLanes, vecs - j, dots + j);
  }
}

// out[r][c] = out[r][c] · rescale[r] + Σ_tokens p[r][token] · v[token][c], for 16 · kVecs channels from `channel`.
template <int kHeads, int kVecs>
inline void MixBlock(const float (*p)[kPageTokens], const float* rescale, const float* v, int64_t d, int64_t count,
                     int64_t channel, float* out) {
  Vec sum[kHeads][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      sum[r][j] = Vec::Load(out + r * d + channel + j * kLanes) * Vec::Set(rescale[r]);
    }
  }
  for (int64_t token = 0; token < count; ++token) {
    const float* from = v + token * d + channel;
    Vec value[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) value[j] = Vec::Load(from + j * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kHeads; ++r) {
      const Vec weight = Vec::Set(p[r][token]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[r][j] = Fma(weight, value[j], sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[r][j].Store(out + r * d + channel + j * kLanes);
  }
}

// The same for all channels from vector `vec` on, kVecs vectors at a time while there are as many.
template <int kHeads, int kVecs>
inline void MixVecs(const float (*p)[kPageTokens], const float* rescale, const float* v, int64_t d, int64_t count,
                    int64_t vec, float* out) {
  for (; (vec + kVecs) * kLanes <= d; vec += kVecs) {
    MixBlock<kHeads, kVecs>(p, rescale, v, d, count, vec * kLanes, out);
  }
  if constexpr (kVecs > 1) MixVecs<kHeads, kVecs / 2>(p, rescale, v, d, count, vec, out);
}

// Unpacked once for all rows of an item.
struct UnpackedPage : PageScales {
  float* k;  // [D, 64]
  float* v;  // [64, D]

  static constexpr int64_t kMostHeads = 4;

  template <int kHeads>
  void Score(const float* q, int64_t d, int64_t vecs, Vec* dots) const {
    ScoreVecs<kHeads, kVecsAtOnce<kHeads, kPageVecs>>(q, d, k, vecs, dots);
  }
  template <int kHeads>
  void Mix(const float (*p)[kPageTokens], const float* rescale, int64_t d, int64_t count, float* out) const {
    MixVecs<kHeads, kVecsAtOnce<kHeads, 8>>(p, rescale, v, d, count, 0, out);
  }
};

// Tokens [0, count) of the page; rounded up to whole vectors of tokens for K, whose lanes are independent.
inline void UnpackKv4(const HeadView& key, const HeadView& value, int64_t d, int64_t count, UnpackedPage* page) {
  const IVec low_nibble = IVec::Set(15);
  for (int64_t token = 0; token < count; token += kLanes) {
    for (int64_t word = 0; word < d / 8; word += kLanes) {
      IVec words[kLanes];  // eight codes of sixteen tokens each
      TransposeWords(key.codes + token * d / 2 + word * 4, d / 2, words);
      const int64_t words_here = d / 8 - word < kLanes ? d / 8 - word : kLanes;
      for (int64_t i = 0; i < words_here; ++i) {
        float* to = page->k + (word + i) * 8 * kPageTokens + token;
        ToFloat(words[i] & low_nibble).Store(to);
        ToFloat(ShiftRight<4>(words[i]) & low_nibble).Store(to + kPageTokens);
        ToFloat(ShiftRight<8>(words[i]) & low_nibble).Store(to + 2 * kPageTokens);
        ToFloat(ShiftRight<12>(words[i]) & low_nibble).Store(to + 3 * kPageTokens);
        ToFloat(ShiftRight<16>(words[i]) & low_nibble).Store(to + 4 * kPageTokens);
        ToFloat(ShiftRight<20>(words[i]) & low_nibble).Store(to + 5 * kPageTokens);
        ToFloat(ShiftRight<24>(words[i]) & low_nibble).Store(to + 6 * kPageTokens);
        ToFloat(ShiftRight<28>(words[i])).Store(to + 7 * kPageTokens);
      }
    }
  }
  for (int64_t token = 0; token < count; ++token) {
    for (int64_t i = 0; i < d; i += 32) {
      const IVec bytes = IVec::LoadU8(value.codes + (token * d + i) / 2);
      ToFloat(bytes & low_nibble).Store(page->v + token * d + i);
      ToFloat(ShiftRight<4>(bytes)).Store(page->v + token * d + i + kLanes);
    }
  }
}

inline void UnpackF32(const HeadView& key, const HeadView& value, int64_t d, int64_t count, UnpackedPage* page) {
  for (int64_t token = 0; token < count; token += kLanes) {
    for (int64_t channel = 0; channel < d; channel += kLanes) {
      IVec words[kLanes];
      TransposeWords(reinterpret_cast<const uint8_t*>(key.floats + token * d + channel), d * sizeof(float), words);
      for (int64_t i = 0; i < kLanes; ++i) words[i].Store(page->k + (channel + i) * kPageTokens + token);
    }
  }
  page->v = value.floats;
}

// ---- KV4 as it lies in the page ----
// In a decode step a code is used by the few heads of one row: storing it as a float first would cost more than using
// it.

// Adds codes number kCode of every word: channel 8 · i + kCode of 16 · kVecs tokens.
template <int kHeads, int kVecs, int kCode>
inline void ScoreCode(const float* q, int64_t d, const IVec (*words)[kLanes], int64_t i, Vec (*sum)[kVecs]) {
  Vec key[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) key[j] = ToFloat(ShiftRight<4 * kCode>(words[j][i]) & IVec::Set(15));
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
    const Vec query = Vec::Set(q[r * d + kCode]);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Fma(query, key[j], sum[r][j]);
  }
}

// As ScoreBlock, of the codes [16 · kVecs, D/2] of so many tokens.
template <int kHeads, int kVecs>
inline void ScoreCodesBlock(const float* q, int64_t d, const uint8_t* codes, Vec* dots) {
  Vec sum[kHeads][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Vec::Zero();
  }
  for (int64_t word = 0; word < d / 8; word += kLanes) {
    IVec words[kVecs][kLanes];  // eight codes of sixteen tokens each
    for (int j = 0; j < kVecs; ++j) TransposeWords(codes + j * kLanes * d / 2 + word * 4, d / 2, words[j]);
    const int64_t words_here = d / 8 - word < kLanes ? d / 8 - word : kLanes;
    for (int64_t i = 0; i < words_here; ++i) {
      const float* from = q + (word + i) * 8;
      ScoreCode<kHeads, kVecs, 0>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 1>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 2>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 3>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 4>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 5>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 6>(from, d, words, i, sum);
      ScoreCode<kHeads, kVecs, 7>(from, d, words, i, sum);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) dots[r * kPageVecs + j] = sum[r][j];
  }
}
template <int kHeads, int kVecs>
inline void ScoreCodes(const float* q, int64_t d, const uint8_t* codes, int64_t vecs, Vec* dots) {
  int64_t j = 0;
  for (; j + kVecs <= vecs; j += kVecs) ScoreCodesBlock<kHeads, kVecs>(q, d, codes + j * kLanes * d / 2, dots + j);
  if constexpr (kVecs > 1) {
    if (j < vecs) ScoreCodes<kHeads, kVecs - 1>(q, d, codes + j * kLanes * d / 2, vecs - j, dots + j);
  }
}

// As MixBlock, for kPairs times 32 channels, whose even ones are one vector and whose odd ones are the next (VOrder).
template <int kHeads, int kPairs>
inline void MixCodesBlock(const float (*p)[kPageTokens], const float* rescale, const uint8_t* codes, int64_t d,
                          int64_t count, int64_t channel, float* out) {
  Vec sum[kHeads][2 * kPairs];
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kPairs; ++j) {
      sum[r][j] = Vec::Load(out + r * d + channel + j * kLanes) * Vec::Set(rescale[r]);
    }
  }
  for (int64_t token = 0; token < count; ++token) {
    const uint8_t* from = codes + (token * d + channel) / 2;
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; ++pair) {
      const IVec bytes = IVec::LoadU8(from + pair * kLanes);
      const Vec even = ToFloat(bytes & IVec::Set(15));
#pragma GCC unroll 4
      for (int r = 0; r < kHeads; ++r) sum[r][2 * pair] = Fma(Vec::Set(p[r][token]), even, sum[r][2 * pair]);
      const Vec odd = ToFloat(ShiftRight<4>(bytes));
#pragma GCC unroll 4
      for (int r = 0; r < kHeads; ++r) sum[r][2 * pair + 1] = Fma(Vec::Set(p[r][token]), odd, sum[r][2 * pair + 1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kHeads; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kPairs; ++j) sum[r][j].Store(out + r * d + channel + j * kLanes);
  }
}
template <int kHeads, int kPairs>
inline void MixCodes(const float (*p)[kPageTokens], const float* rescale, const uint8_t* codes, int64_t d,
                     int64_t count, int64_t channel, float* out) {
  for (; channel + kPairs * 2 * kLanes <= d; channel += kPairs * 2 * kLanes) {
    MixCodesBlock<kHeads, kPairs>(p, rescale, codes, d, count, channel, out);
  }
  if constexpr (kPairs > 1) MixCodes<kHeads, kPairs / 2>(p, rescale, codes, d, count, channel, out);
}

struct PackedPage : PageScales {
  const uint8_t* k;  // [64, D/2]
  const uint8_t* v;  // [64, D/2]

  // Heads whose sums of a pair of vectors fit into the registers.
  static constexpr int64_t kMostHeads = kAttentionSums / 2;

  template <int kHeads>
  void Score(const float* q, int64_t d, int64_t vecs, Vec* dots) const {
    ScoreCodes<kHeads, kVecsAtOnce<kHeads, kPageVecs>>(q, d, k, vecs, dots);
  }
  template <int kHeads>
  void Mix(const float (*p)[kPageTokens], const float* rescale, int64_t d, int64_t count, float* out) const {
    MixCodes<kHeads, kVecsAtOnce<kHeads, 8> / 2>(p, rescale, v, d, count, 0, out);
  }
};

}  // namespace nibble::NIBBLE_ISA
