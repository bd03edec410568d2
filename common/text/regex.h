// The regular expressions of tokenizer.json, matched with PCRE2's just-in-time compiler.
//
// The reference runs them with Oniguruma (Ruby syntax). The few constructs whose meaning differs are rewritten (\s is
// exactly Unicode White_Space) or refused (\w, \b, nested classes, ...), never silently reinterpreted. PCRE2 10.42
// knows Unicode 14: newer letters and digits count as unassigned.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;

namespace nibble {

// Oniguruma's pattern in PCRE2's syntax. UNIMPLEMENTED names the construct that has no equal.
absl::StatusOr<std::string> TranslatePattern(std::string_view oniguruma_pattern);

// A pattern that matches exactly `literal`.
std::string QuotePattern(std::string_view literal);

// Immutable; usable from any number of threads, each with its own RegexScan.
class Regex {
 public:
  // INVALID_ARGUMENT with PCRE2's message and offset; UNIMPLEMENTED for what TranslatePattern refuses and for a pattern
  // that can match the empty string (the engines disagree on where those matches fall).
  static absl::StatusOr<Regex> Compile(std::string_view oniguruma_pattern);

  static constexpr size_t kMaxPatternBytes = 16384;

 private:
  friend class RegexScan;
  explicit Regex(std::shared_ptr<const pcre2_real_code_8> code, bool jit) : code_(std::move(code)), jit_(jit) {}

  std::shared_ptr<const pcre2_real_code_8> code_;
  bool jit_;
};

// Finds the matches of a pattern in one text after the other. A pattern comes from a file and may backtrack
// exponentially, or quadratically with the text: every attempt has a limit on its steps, and the scans of one call a
// deadline far beyond what any sensible pattern needs.
class RegexScan {
 public:
  // CPU time of the calling thread: unlike the time of day it does not depend on what else the machine does.
  using CpuTime = std::chrono::nanoseconds;
  // When scans over `text_bytes` bytes that begin now must have ended, the work between their matches included.
  static CpuTime Deadline(size_t text_bytes);

  // `regex` must outlive the scan. The scan belongs to the thread that asked for the deadline.
  RegexScan(const Regex& regex, CpuTime deadline);

  // Begins a new text (valid UTF-8, alive until the last Next).
  void Start(std::string_view text);

  // The next match, not empty, as byte offsets. False at the end of the text or on an error: see status().
  bool Next(size_t* begin, size_t* end);

  // RESOURCE_EXHAUSTED once a limit was hit.
  const absl::Status& status() const { return status_; }

 private:
  int Match(size_t from, size_t last_start);
  bool Exceeded(std::string_view limit);

  struct FreeMatchData {
    void operator()(pcre2_real_match_data_8* data) const;
  };
  struct FreeMatchContext {
    void operator()(pcre2_real_match_context_8* context) const;
  };

  const Regex* regex_;
  std::unique_ptr<pcre2_real_match_data_8, FreeMatchData> match_;
  std::unique_ptr<pcre2_real_match_context_8, FreeMatchContext> context_;
  CpuTime deadline_;
  CpuTime last_clock_;
  std::string_view text_;
  size_t position_ = 0;
  size_t window_ = 0;  // start positions that one call into PCRE2 may try
  int calls_to_clock_ = 0;
  absl::Status status_;
};

}  // namespace nibble
