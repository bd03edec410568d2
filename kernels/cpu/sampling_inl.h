// Sampling. Everything below is defined so that another backend can reproduce the ids bit by bit.
//
// 1. Shaping, per id, in f32: NaN becomes -inf; biases are added in list order; suppressed ids become -inf; if the row
//    has a history: x > 0 ? x / repetition : x · repetition for ids in prompt or output, then x - count · frequency,
//    then x - presence for ids in the output. The result is clamped to at most FLT_MAX.
// 2. Greedy (temperature 0): the largest x, ties to the smaller id.
// 3. z = (x - max x) / temperature, so z <= 0 and the best is exactly 0.
// 4. top-k, top-p and min-p each keep a prefix of the ids ordered by (z descending, id ascending). top-k: the first k.
//    top-p: the mass of an id is floor(Exp(z) · 2^40), an integer, so that sums do not depend on their order; the
//    shortest prefix whose mass is >= top_p (as f64) · total (as f64), the total taken over what top-k left. min-p:
//    Exp(z) >= min_p (the best has probability 1 in this scale).
// 5. The draw: of the ids kept, the largest z + g(id), ties to the smaller id (Gumbel-max). g(id) = -Log(E),
//    E = NegLogOneMinus(v), v = min(float(r >> 1) · 2^-31 + 2^-32 (one fma), 1 - 2^-24), r a word of Philox4x32-10
//    (Salmon et al., SC'11) with key (seed low, seed high) and counter (id / 64 · 16 + id % 16, position, 0, 0), word
//    number id % 64 / 16. So 16 counters serve 64 consecutive ids, and sixteen lanes hold consecutive ids.
// 6. Where no id has x > -inf: the smallest id that is not suppressed, else 0.
//
// Log-probabilities: of the logits as they came (NaN as -inf, +inf as FLT_MAX): (x - max) - Log(f32(sum) · 2^-40), the
// sum of the masses floor(Exp(x - max) · 2^40), integers again.
#pragma once

#include "kernels/cpu/math_inl.h"

namespace nibble::NIBBLE_ISA {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
inline constexpr int64_t kDrawBlock = 64;
inline constexpr float kLargestGumbel = 22.5f;  // g <= -Log(2^-32) = 22.18...

// Probabilities relative to the best, as integers: their sums do not depend on the order of summation.
inline constexpr float kMassUnit = 0x1p-40f;
// weight <= 1, so the signed conversion, which is one instruction, will do.
inline uint64_t MassOf(float weight) { return static_cast<uint64_t>(static_cast<int64_t>(weight * 0x1p40f)); }

// NaN to -inf, +inf to FLT_MAX.
inline Vec Sane(Vec x) {
  const Vec bounded = Min(x, Vec::Set(std::numeric_limits<float>::max()));
  const Vec low = Vec::Set(kMinusInfinity);
  return SelectLess(low, x, bounded, low);
}
inline float Sane(float x) {
  if (!(x > kMinusInfinity)) return kMinusInfinity;
  return x < std::numeric_limits<float>::max() ? x : std::numeric_limits<float>::max();
}

// Copies with Sane; pads to whole draw blocks with -inf.
inline void CopySane(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Sane(Vec::Load(from + i)).Store(to + i);
  for (; i < count; ++i) to[i] = Sane(from[i]);
  for (; i % kDrawBlock != 0; ++i) to[i] = kMinusInfinity;
}

inline float MaxOf(const float* x, int64_t padded) {
  Vec m = Vec::Set(kMinusInfinity);
  for (int64_t i = 0; i < padded; i += kLanes) m = Max(Vec::Load(x + i), m);
  return ReduceMax(m);
}

// ---- log-probabilities ---------------------------------------------------------------------------------------------

struct LogSoftmax {
  float max;
  float log_sum;
  float Of(float x) const { return x == kMinusInfinity ? kMinusInfinity : (x - max) - log_sum; }
};

inline LogSoftmax MakeLogSoftmax(const float* x, int64_t padded) {
  const float max = MaxOf(x, padded);
  if (max == kMinusInfinity) return {0.0f, 0.0f};
  uint64_t sum = 0;
  float weights[kLanes];
  for (int64_t i = 0; i < padded; i += kLanes) {
    Exp(Vec::Load(x + i) - Vec::Set(max)).Store(weights);
    for (float weight : weights) sum += MassOf(weight);
  }
  return {max, Log(static_cast<float>(sum) * kMassUnit)};
}

// The k best of x by (value descending, id ascending).
inline void WriteTopLogprobs(const float* x, int64_t vocab, int64_t padded, const LogSoftmax& softmax, int64_t k,
                             int32_t* ids, float* logprobs) {
  float values[kMaxTopLogprobs];
  int64_t found = 0;
  for (int64_t begin = 0; begin < padded && k > 0; begin += kLanes) {
    if (found == k && !(ReduceMax(Vec::Load(x + begin)) > values[k - 1])) continue;
    for (int64_t i = begin; i < begin + kLanes && i < vocab; ++i) {
      if (found == k && !(x[i] > values[k - 1])) continue;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && x[i] > values[at - 1]; --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = x[i];
      ids[at] = static_cast<int32_t>(i);
    }
  }
  for (int64_t i = 0; i < found; ++i) logprobs[i] = softmax.Of(values[i]);
  for (int64_t i = found; i < kMaxTopLogprobs; ++i) {
    ids[i] = -1;
    logprobs[i] = kMinusInfinity;
  }
}

// ---- shaping -------------------------------------------------------------------------------------------------------

inline int64_t CheckedId(int64_t id, int64_t vocab) {
  NIBBLE_CHECK(id >= 0 && id < vocab, "token id " + std::to_string(id) + " of vocabulary " + std::to_string(vocab));
  return id;
}

// What the row asks for must have been given.
inline void CheckRow(const SampleArgs& args, const SampleRow& p) {
  NIBBLE_CHECK(p.num_logprobs <= kMaxTopLogprobs, "num_logprobs " + std::to_string(p.num_logprobs));
  NIBBLE_CHECK(
      p.num_logprobs < 0 || (args.logprobs != nullptr && args.top_ids != nullptr && args.top_logprobs != nullptr),
      "logprobs, top_ids or top_logprobs is null");
  NIBBLE_CHECK(p.slot < 0 || args.slot_tokens != nullptr, "slot_tokens is null");
  NIBBLE_CHECK(p.history < 0 || args.history != nullptr, "history is null");
  NIBBLE_CHECK(p.temperature >= 0, "temperature " + std::to_string(p.temperature));
}

inline void Shape(const SampleArgs& args, const SampleRow& p, float* x) {
  for (int64_t i = p.bias_begin; i < p.bias_end; ++i) {
    float& value = x[CheckedId(args.bias_ids[i], args.vocab)];
    value = Sane(value + args.bias_values[i]);
  }
  for (int64_t i = p.suppress_begin; i < p.suppress_end; ++i) {
    x[CheckedId(args.suppress_ids[i], args.vocab)] = kMinusInfinity;
  }
  if (p.history < 0) return;
  const uint16_t* history = args.history + p.history * args.vocab;
  for (int64_t i = 0; i < args.vocab; ++i) {
    if (history[i] == 0) continue;
    const int count = history[i] & 0x7fff;
    float value = x[i] > 0 ? x[i] / p.repetition_penalty : x[i] * p.repetition_penalty;
    value = value - static_cast<float>(count) * p.frequency_penalty;
    if (count > 0) value = value - p.presence_penalty;
    x[i] = Sane(value);
  }
}

// ---- truncation ----------------------------------------------------------------------------------------------------

// An id is kept iff its key is larger, or equal and the id not larger.
struct Cut {
  uint32_t key = 0;
  int64_t id = std::numeric_limits<int64_t>::max();
};

// Orders as the floats do, -0 as +0.
inline uint32_t OrderedKey(float z) {
  const uint32_t bits = std::bit_cast<uint32_t>(z + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The shortest prefix of candidates (ids ascending in `ids`, ordered by key descending, then id) whose weight reaches
// `target`: a radix descent over the four bytes of the key, so linear in the candidates. weights null: each weighs 1.
// `ids` is overwritten.
inline Cut FindCut(const uint32_t* keys, const uint64_t* weights, double target, int32_t* ids, int64_t count) {
  uint64_t above = 0;  // weight of what is certainly kept
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t bins[256] = {};
    for (int64_t i = 0; i < count; ++i) bins[(keys[ids[i]] >> shift) & 255] += weights == nullptr ? 1 : weights[ids[i]];
    int bin = 255;
    int last_used = 255;
    for (; bin >= 0; --bin) {
      if (bins[bin] == 0) continue;
      last_used = bin;
      if (static_cast<double>(above + bins[bin]) >= target) break;
      above += bins[bin];
    }
    if (bin < 0) {  // rounding of the target: everything that weighs anything
      bin = last_used;
      above -= bins[bin];
    }
    prefix |= static_cast<uint32_t>(bin) << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (((keys[ids[i]] >> shift) & 255) == static_cast<uint32_t>(bin)) ids[kept++] = ids[i];
    }
    count = kept;
  }
  for (int64_t i = 0; i < count; ++i) {
    above += weights == nullptr ? 1 : weights[ids[i]];
    if (static_cast<double>(above) >= target) return {prefix, ids[i]};
  }
  return {prefix, count > 0 ? ids[count - 1] : 0};
}

// Sets z of ids that top-k and top-p drop to -inf.
inline void Truncate(const SampleRow& p, int64_t vocab, float* z, void* memory) {
  const bool top_k = p.top_k > 0 && p.top_k < vocab;
  const bool top_p = p.top_p < 1.0f;
  if (!top_k && !top_p) return;
  uint64_t* masses = static_cast<uint64_t*>(memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(masses + vocab);
  int32_t* ids = reinterpret_cast<int32_t*>(keys + vocab);
  for (int64_t i = 0; i < vocab; ++i) keys[i] = OrderedKey(z[i]);
  Cut cut;
  if (top_k) {
    for (int64_t i = 0; i < vocab; ++i) ids[i] = static_cast<int32_t>(i);
    cut = FindCut(keys, nullptr, p.top_k, ids, vocab);
  }
  if (top_p) {
    // All ids lighter than this weigh less than half of what top-p drops: none of them is in the prefix. (The total is
    // at least the mass of the best id, 2^40.)
    const uint64_t negligible = MassOf((1.0f - p.top_p) * 0.5f / static_cast<float>(vocab));
    uint64_t total = 0;
    int64_t count = 0;
    float weights[kLanes];
    for (int64_t begin = 0; begin < vocab; begin += kLanes) {
      Exp(Vec::Load(z + begin)).Store(weights);  // z is padded with -inf
      for (int64_t i = begin; i < begin + kLanes && i < vocab; ++i) {
        if (keys[i] < cut.key || (keys[i] == cut.key && i > cut.id)) continue;
        masses[i] = MassOf(weights[i - begin]);
        total += masses[i];
        if (masses[i] <= negligible) continue;
        ids[count++] = static_cast<int32_t>(i);
      }
    }
    cut = FindCut(keys, masses, static_cast<double>(p.top_p) * static_cast<double>(total), ids, count);
  }
  for (int64_t i = 0; i < vocab; ++i) {
    const bool kept = keys[i] > cut.key || (keys[i] == cut.key && i <= cut.id);
    z[i] = kept ? z[i] : kMinusInfinity;
  }
}

// ---- the draw ------------------------------------------------------------------------------------------------------

// Philox4x32-10 for counters c0 = first + lane; the four output words.
inline void Philox(uint64_t seed, int32_t position, int32_t first, IVec word[4]) {
  IVec c0 = IVec::Iota() + IVec::Set(first), c1 = IVec::Set(position), c2 = IVec::Zero(), c3 = IVec::Zero();
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const IVec m0 = IVec::Set(static_cast<int32_t>(0xd2511f53u)), m1 = IVec::Set(static_cast<int32_t>(0xcd9e8d57u));
  for (int round = 0; round < 10; ++round) {
    const IVec high0 = MulHighU32(m0, c0), low0 = m0 * c0;
    const IVec high1 = MulHighU32(m1, c2), low1 = m1 * c2;
    c0 = high1 ^ c1 ^ IVec::Set(static_cast<int32_t>(key0));
    c1 = low1;
    c2 = high0 ^ c3 ^ IVec::Set(static_cast<int32_t>(key1));
    c3 = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

inline Vec Gumbel(IVec random) {
  const Vec v = Fma(ToFloat(ShiftRight<1>(random)), Vec::Set(0x1p-31f), Vec::Set(0x1p-32f));
  return Vec::Zero() - Log(NegLogOneMinus(Min(v, Vec::Set(1.0f - 0x1p-24f))));
}

// The id that wins; -1 when no z is above -inf. z is padded with -inf to whole blocks.
inline int32_t Draw(const SampleRow& p, const float* z, int64_t padded) {
  float best = kMinusInfinity;
  int64_t best_id = -1;
  for (int64_t begin = 0; begin < padded; begin += kDrawBlock) {
    Vec zs[4];
    Vec high = Vec::Set(kMinusInfinity);
    for (int j = 0; j < 4; ++j) {
      zs[j] = Vec::Load(z + begin + j * kLanes);
      if (p.min_p > 0) {
        zs[j] = SelectLess(Exp(zs[j]), Vec::Set(p.min_p), Vec::Set(kMinusInfinity), zs[j]);
      }
      high = Max(zs[j], high);
    }
    const float block_max = ReduceMax(high);
    // Nothing here can win, whatever it draws.
    if (block_max == kMinusInfinity || block_max + kLargestGumbel < best) continue;
    IVec words[4];
    Philox(p.seed, p.position, static_cast<int32_t>(begin / kDrawBlock * kLanes), words);
    for (int j = 0; j < 4; ++j) {
      const Vec score = zs[j] + Gumbel(words[j]);
      if (!(ReduceMax(score) > best)) continue;
      float lanes[kLanes];
      score.Store(lanes);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] > best) {
          best = lanes[lane];
          best_id = begin + j * kLanes + lane;
        }
      }
    }
  }
  return static_cast<int32_t>(best_id);
}

inline int32_t SmallestAllowed(const SampleArgs& args, const SampleRow& p) {
  for (int64_t id = 0; id < args.vocab; ++id) {
    bool suppressed = false;
    for (int64_t i = p.suppress_begin; i < p.suppress_end && !suppressed; ++i) suppressed = args.suppress_ids[i] == id;
    if (!suppressed) return static_cast<int32_t>(id);
  }
  return 0;
}

// x: the row's logits, sane and padded; overwritten.
inline int32_t Choose(const SampleArgs& args, const SampleRow& p, float* x, int64_t padded, void* memory) {
  Shape(args, p, x);
  const float max = MaxOf(x, padded);
  if (max == kMinusInfinity) return SmallestAllowed(args, p);
  int32_t best = 0;
  while (x[best] != max) ++best;
  if (p.temperature == 0.0f) return best;
  for (int64_t i = 0; i < padded; i += kLanes) {
    ((Vec::Load(x + i) - Vec::Set(max)) / Vec::Set(p.temperature)).Store(x + i);
  }
  Truncate(p, args.vocab, x, memory);
  const int32_t drawn = Draw(p, x, padded);
  return drawn < 0 ? best : drawn;  // min_p > 1 keeps nothing
}

void Sample(const SampleArgs& args, int64_t row, Scratch* scratch) {
  const SampleRow& p = args.params[row];
  CheckRow(args, p);
  const int64_t vocab = args.vocab, padded = CeilDiv(vocab, kDrawBlock) * kDrawBlock;
  float* x = static_cast<float*>(scratch->Reserve(padded * 4 + vocab * 16));
  CopySane(args.logits + row * vocab, vocab, x);

  LogSoftmax softmax{};
  if (p.num_logprobs >= 0) {
    softmax = MakeLogSoftmax(x, padded);
    WriteTopLogprobs(x, vocab, padded, softmax, p.num_logprobs, args.top_ids + row * kMaxTopLogprobs,
                     args.top_logprobs + row * kMaxTopLogprobs);
  }
  int32_t token = p.target;
  if (p.target < 0) {
    token = Choose(args, p, x, padded, x + padded);
    if (p.history >= 0) {
      uint16_t& seen = args.history[p.history * vocab + token];
      if ((seen & 0x7fff) != 0x7fff) ++seen;
    }
  }
  args.token_ids[row] = static_cast<int32_t>(CheckedId(token, vocab));
  if (p.num_logprobs >= 0) args.logprobs[row] = softmax.Of(Sane(args.logits[row * vocab + token]));
  if (p.slot >= 0) args.slot_tokens[p.slot] = token;
}

}  // namespace nibble::NIBBLE_ISA
