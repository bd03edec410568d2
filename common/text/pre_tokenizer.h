// Cuts text into the words that merges never cross. Stages as tokenizer.json lists them; each cuts the pieces of the
// stage before it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/text/regex.h"

namespace nibble {

// The pattern of ByteLevel with use_regex. Source: openai/gpt-2 src/encoder.py, huggingface/tokenizers byte_level.rs.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct SplitStage {
  std::string pattern;        // Oniguruma syntax; empty: the stage does not cut
  bool keep_matches = true;   // pieces that match the pattern go on
  bool keep_gaps = true;      // what lies between matches goes on as pieces too
  bool prefix_space = false;  // first put a space in front of a piece that does not begin with one
};

// Immutable; usable from any number of threads.
class PreTokenizer {
 public:
  static absl::StatusOr<PreTokenizer> Create(std::vector<SplitStage> stages);

  // One thread's state while it cuts a text. Making one costs some allocations, so it serves all segments of a text.
  class Scratch {
   public:
    // text_bytes: of all segments to come; sets the patterns' time limit. `pre_tokenizer` must outlive this object,
    // which stays on the thread that made it.
    Scratch(const PreTokenizer& pre_tokenizer, size_t text_bytes);

   private:
    friend class PreTokenizer;
    std::vector<std::optional<RegexScan>> scans_;  // [stages]
    std::vector<std::string> prefixed_;            // [stages]
  };

  // Calls `word` with every piece of `segment` (valid UTF-8), none of them empty. RESOURCE_EXHAUSTED as RegexScan says.
  absl::Status Split(std::string_view segment, Scratch* scratch, absl::FunctionRef<void(std::string_view)> word) const;

 private:
  PreTokenizer() = default;
  absl::Status RunStage(size_t index, std::string_view piece, Scratch* scratch,
                        absl::FunctionRef<void(std::string_view)> word) const;

  std::vector<SplitStage> stages_;
  std::vector<std::optional<Regex>> regexes_;  // [stages]
};

}  // namespace nibble
