// Finds stop strings in text that arrives in pieces, and holds back what may turn out to be the beginning of one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace nibble {

// What admission demands of a request's stop strings: at most kMaxStopStrings, each 1..kMaxStopBytes bytes of valid
// UTF-8. INVALID_ARGUMENT names the offending entry.
inline constexpr size_t kMaxStopStrings = 64;
inline constexpr size_t kMaxStopBytes = 1024;
absl::Status ValidateStopStrings(std::span<const std::string> stops);

// One per generated sequence, used by one thread at a time. Every stop string is followed by its own Knuth-Morris-Pratt
// automaton, so a byte costs O(number of stop strings) amortised, whatever the text.
//
// The match that ends first wins; of several that end at the same byte, the longest. Hence the result does not depend
// on how the text was cut into pieces.
class StopMatcher {
 public:
  // include: a matched stop string is part of the output (and nothing needs to be held back). Empty strings never
  // match.
  explicit StopMatcher(std::vector<std::string> stops = {}, bool include = false);

  struct Step {
    std::string text;               // goes out now: whole characters if the input came in whole characters
    std::optional<size_t> matched;  // index of the stop string that ended the text with this call
  };
  // After a match all further text is dropped.
  Step Append(std::string_view text);

  // The end of the text came without a match: what was held back is output after all. Empty after a match.
  std::string Flush();

  size_t held_bytes() const { return held_.size(); }

 private:
  struct Automaton {
    std::string stop;
    std::vector<uint32_t> fallback;  // [stop.size() + 1]: length of the longest proper border of each prefix
    uint32_t matched_bytes = 0;      // the longest prefix of `stop` that ends the text so far
  };
  std::vector<Automaton> automata_;
  bool include_;
  bool done_ = false;
  std::string held_;
};

}  // namespace nibble
