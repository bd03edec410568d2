// How much room admission keeps back so that running sequences can go on generating. Reserving every max_tokens (TGI)
// leaves most of the memory idle, because outputs end early; reserving nothing (vLLM) admits sequences only to preempt
// others. So a fraction of what may still be generated is kept back: small until a preemption proves it too small,
// then as large as the outputs of the moment suggest, then slowly smaller again.
// Source: SGLang, srt/managers/schedule_policy.py and new_token_ratio (constants are theirs), with one difference: it
// starts at the minimum, because a preemption costs little when prefixes are cached.
#pragma once

#include <algorithm>
#include <cstdint>

namespace nibble {

class OutputReserve {
 public:
  static constexpr uint32_t kMaxTokensPerSequence = 4096;  // more of a max_tokens is never reserved for
  static constexpr double kMinimum = 0.1;
  static constexpr uint32_t kDecaySteps = 600;      // from 1 down to the minimum
  static constexpr uint32_t kLookaheadTokens = 20;  // after a preemption: what everyone generates next, at least

  double ratio() const { return ratio_; }

  // Tokens kept back when `remaining` is the sum over sequences of Clip(what each may still generate).
  uint64_t Tokens(uint64_t remaining) const { return static_cast<uint64_t>(ratio_ * static_cast<double>(remaining)); }
  static uint32_t Clip(uint32_t remaining) { return std::min(remaining, kMaxTokensPerSequence); }

  void OnStep() { ratio_ = std::max(kMinimum, ratio_ - (1.0 - kMinimum) / kDecaySteps); }
  // Pages ran out while `sequences` ran that together generated `generated` of at most `max_tokens` tokens.
  void OnPreemption(uint64_t generated, uint64_t sequences, uint64_t max_tokens) {
    const double expected = static_cast<double>(generated + kLookaheadTokens * sequences);
    ratio_ = std::clamp(expected / static_cast<double>(std::max<uint64_t>(max_tokens, 1)), ratio_, 1.0);
  }

 private:
  double ratio_ = kMinimum;
};

}  // namespace nibble
