// Token ids to text, one token at a time: what a stream sends after every step.
//
// A request's text passes two filters, each holding back what is not yet certain:
//   Detokenizer  ids -> whole characters (a token may end inside a character)
//   StopMatcher  characters -> characters that belong to no stop string (common/text/stop_matcher.h)
//
//   StopMatcher::Step step = stops.Append(detokenizer.Append(id));
//   Send(step.text);
//   if (step.matched) Finish(kStop);
//   ...
//   at the end (length, end-of-text token, cancellation):
//   step = stops.Append(detokenizer.Finish());   Send(step.text);
//   if (!step.matched) Send(stops.Flush());
//
// The concatenated output does not depend on how tokens were grouped into calls, and without stop strings it equals
// Tokenizer::Decode of the same ids.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/text/tokenizer.h"

namespace nibble {

struct DetokenizerOptions {
  bool skip_special_tokens = true;
};

// One per generated sequence, used by one thread at a time. O(bytes of the token) per call; no allocation unless a
// character is split between tokens.
class Detokenizer {
 public:
  // `tokenizer` must outlive this object.
  explicit Detokenizer(const Tokenizer* tokenizer, DetokenizerOptions options = {});

  // The text that this token made certain; the view lives until the next call. An id that names no token (a row that
  // pads the model's embedding) stands for no text.
  std::string_view Append(uint32_t id);

  // What is still held back: an unfinished character, as U+FFFD. Afterwards the object is as new.
  std::string_view Finish();

 private:
  const Tokenizer* tokenizer_;
  DetokenizerOptions options_;
  std::string pending_;  // the valid beginning of an unfinished character: at most 3 bytes between calls
  std::string text_;     // backs the returned view when it is not the token itself
};

}  // namespace nibble
