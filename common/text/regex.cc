#include "common/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "absl/strings/ascii.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

// One attempt may take this many steps, and this many more per byte of the text: a pattern such as [A-Z]*[a-z]+ walks
// back over a long run once, quite innocently.
constexpr uint64_t kStepsPerAttempt = 100'000;
constexpr uint64_t kStepsPerByte = 8;
// The interpreter, which takes over when a pattern needs more than the compiled code's 32 KiB stack, keeps its frames
// here.
constexpr uint32_t kHeapLimitKiB = 64 * 1024;
constexpr uint32_t kMaxNesting = 64;

// PCRE2 counts steps per start position, so the clock is looked at after a few start positions only; while nothing
// matches and time does not pass, windows grow and a long gap costs few calls.
constexpr size_t kFirstWindow = 64;
constexpr size_t kLargestWindow = size_t{1} << 20;
constexpr auto kQuick = std::chrono::milliseconds(2);
constexpr int kCallsPerClock = 64;
constexpr auto kBaseTime = std::chrono::seconds(2);
constexpr auto kTimePerByte =
    std::chrono::microseconds(5);  // 0.2 MB/s: a hundredth of what good patterns and merges need

// White_Space as PCRE2 class contents: its own \s has U+180E in addition.
constexpr std::string_view kSpaceClass = "\\t-\\r\\x{85}\\p{Z}";

std::chrono::nanoseconds ThreadCpuTime() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

std::string Quote(std::string_view pattern) { return fmt::format("regular expression \"{}\"", Excerpt(pattern, 200)); }

absl::Status Refuse(std::string_view pattern, size_t offset, std::string_view construct) {
  return absl::UnimplementedError(fmt::format("{}, offset {}: {} is not supported", Quote(pattern), offset, construct));
}

// \p{...} at `offset`: general categories pass, scripts get the prefix that excludes script extensions.
absl::Status TranslateProperty(std::string_view pattern, size_t offset, size_t* next, std::string* result) {
  constexpr std::array<std::string_view, 37> kCategories = {
      "C",  "Cc", "Cf", "Cn", "Co", "Cs", "L",  "Ll", "Lm", "Lo", "Lt", "Lu", "M",  "Mc", "Me", "Mn", "N",  "Nd", "Nl",
      "No", "P",  "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "S",  "Sc", "Sk", "Sm", "So", "Z",  "Zl", "Zp", "Zs"};
  const size_t close = pattern.find('}', offset);
  if (offset + 2 >= pattern.size() || pattern[offset + 2] != '{' || close == std::string_view::npos)
    return Refuse(pattern, offset, "a property without braces");
  std::string_view name = pattern.substr(offset + 3, close - offset - 3);
  *next = close + 1;
  const bool negated = name.starts_with('^');
  if (negated) name.remove_prefix(1);
  std::string_view kind;
  if (std::find(kCategories.begin(), kCategories.end(), name) == kCategories.end()) {
    kind = "sc:";
    const bool is_name =
        std::all_of(name.begin(), name.end(), [](char c) { return absl::ascii_isalpha(c) || c == '_'; });
    if (name.size() < 3 || !is_name) return Refuse(pattern, offset, fmt::format("the property \"{}\"", Excerpt(name)));
  }
  *result += fmt::format("{}{{{}{}{}}}", pattern.substr(offset, 2), negated ? "^" : "", kind, name);
  return absl::OkStatus();
}

// \xHH, \x{H...} and \uHHHH at `offset`.
absl::Status TranslateCodePoint(std::string_view pattern, size_t offset, size_t* next, std::string* result) {
  const bool is_byte = pattern[offset + 1] == 'x';
  const bool braces = is_byte && offset + 2 < pattern.size() && pattern[offset + 2] == '{';
  const size_t first = offset + 2 + (braces ? 1 : 0);
  const size_t end = braces ? pattern.find('}', first) : first + (is_byte ? 2 : 4);
  if (end == std::string_view::npos || end > pattern.size()) return Refuse(pattern, offset, "an unfinished code point");
  const std::string_view hex = pattern.substr(first, end - first);
  if (hex.empty() || !std::all_of(hex.begin(), hex.end(), [](char c) { return absl::ascii_isxdigit(c); }))
    return Refuse(pattern, offset, "a code point that is not hexadecimal");
  if (is_byte && !braces && hex[0] > '7') return Refuse(pattern, offset, "a \\x byte above 7F");
  *result += fmt::format("\\x{{{}}}", hex);
  *next = end + (braces ? 1 : 0);
  return absl::OkStatus();
}

// The interval at `offset` ("{3}", "{1,3}", "{2,}"): its length, or 0 when it is none.
size_t IntervalLength(std::string_view pattern, size_t offset) {
  size_t i = offset + 1;
  const auto skip_digits = [&] {
    const size_t first = i;
    while (i < pattern.size() && absl::ascii_isdigit(pattern[i])) ++i;
    return i - first;
  };
  if (skip_digits() == 0) return 0;
  if (i < pattern.size() && pattern[i] == ',') {
    ++i;
    skip_digits();
  }
  return i < pattern.size() && pattern[i] == '}' ? i + 1 - offset : 0;
}

// The escape at `offset`, appended to `result` in PCRE2's syntax; *next is where the pattern goes on.
absl::Status TranslateEscape(std::string_view pattern, size_t offset, bool in_class, size_t* next,
                             std::string* result) {
  if (offset + 1 == pattern.size()) return Refuse(pattern, offset, "a lone backslash");
  const char letter = pattern[offset + 1];
  *next = offset + 2;
  switch (letter) {
    case 's':
      *result += in_class ? std::string(kSpaceClass) : fmt::format("[{}]", kSpaceClass);
      return absl::OkStatus();
    case 'S':
      if (in_class) return Refuse(pattern, offset, "\\S inside a class");
      *result += fmt::format("[^{}]", kSpaceClass);
      return absl::OkStatus();
    case 'v':
      result->append("\\x{0B}");
      return absl::OkStatus();
    case 'p':
    case 'P':
      return TranslateProperty(pattern, offset, next, result);
    case 'x':
    case 'u':
      return TranslateCodePoint(pattern, offset, next, result);
    default:
      // Of the other letters and digits these mean the same to both; punctuation is literal.
      if (absl::ascii_isalnum(letter) && std::string_view("tnrfaedDAzZ").find(letter) == std::string_view::npos)
        return Refuse(pattern, offset, fmt::format("the escape \\{}", std::string(1, letter)));
      *result += {'\\', letter};
      return absl::OkStatus();
  }
}

}  // namespace

absl::StatusOr<std::string> TranslatePattern(std::string_view pattern) {
  std::string result;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size();) {
    const std::string_view rest = pattern.substr(i + 1);
    const char c = pattern[i];
    if (c == '\\') {
      NIBBLE_RETURN_IF_ERROR(TranslateEscape(pattern, i, in_class, &i, &result));
      continue;
    }
    size_t length = 1;
    if (in_class) {
      if (c == '[') return Refuse(pattern, i, "a class or bracket inside a class");
      if (c == '&' && rest.starts_with("&")) return Refuse(pattern, i, "the intersection of classes");
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
      if (rest.starts_with("^")) length = 2;
      if (pattern.substr(i + length).starts_with("]")) return Refuse(pattern, i, "an empty class");
    } else if (c == '(' && rest.starts_with("*")) {
      return Refuse(pattern, i, "a backtracking verb");
    } else if (c == '(' && rest.starts_with("?")) {
      // (?i) in the middle of an alternation binds differently; m and x options, names and conditions need not agree.
      bool same = i == 0 && rest.starts_with("?i)");
      for (const std::string_view form : {"?:", "?=", "?!", "?>", "?<=", "?<!", "?i:", "?-i:"})
        same |= rest.starts_with(form);
      if (!same) return Refuse(pattern, i, fmt::format("the group \"({}\"", rest.substr(0, 2)));
    } else if (c == '{') {
      length = IntervalLength(pattern, i);
      if (length == 0) return Refuse(pattern, i, "a brace that begins no interval");
      const std::string_view after = pattern.substr(i + length);
      if (after.starts_with("+") || after.starts_with("?"))
        return Refuse(pattern, i, "a quantifier behind an interval");
    }
    result.append(pattern.substr(i, length));
    i += length;
  }
  return result;
}

std::string QuotePattern(std::string_view literal) {
  std::string result;
  for (const char c : literal) {
    // Letters and digits must not be escaped, control characters and bytes of longer characters need not be.
    if (absl::ascii_ispunct(c)) result.push_back('\\');
    result.push_back(c);
  }
  return result;
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.empty() || pattern.size() > kMaxPatternBytes)
    return absl::InvalidArgumentError(
        fmt::format("regular expression has {} bytes, must be 1..{}", pattern.size(), kMaxPatternBytes));
  NIBBLE_ASSIGN_OR_RETURN(const std::string translated, TranslatePattern(pattern));

  // Ruby's ^ and $ match at every line, lines end with LF, and . does not match LF.
  std::unique_ptr<pcre2_compile_context_8, decltype(&pcre2_compile_context_free_8)> context(
      pcre2_compile_context_create_8(nullptr), &pcre2_compile_context_free_8);
  NIBBLE_CHECK(context != nullptr, "out of memory");
  pcre2_set_newline_8(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit_8(context.get(), kMaxNesting);
  int error = 0;
  PCRE2_SIZE error_offset = 0;
  pcre2_code_8* code =
      pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(translated.data()), translated.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_USE_OFFSET_LIMIT,
                      &error, &error_offset, context.get());
  if (code == nullptr) {
    std::array<PCRE2_UCHAR8, 256> message{};
    pcre2_get_error_message_8(error, message.data(), message.size());
    return absl::InvalidArgumentError(fmt::format("{}, offset {}: {}", Quote(translated), error_offset,
                                                  reinterpret_cast<const char*>(message.data())));
  }
  std::shared_ptr<const pcre2_real_code_8> owner(
      code, [](const pcre2_real_code_8* c) { pcre2_code_free_8(const_cast<pcre2_code_8*>(c)); });
  uint32_t matches_empty = 0;
  pcre2_pattern_info_8(code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) return absl::UnimplementedError(fmt::format("{} can match the empty string", Quote(pattern)));
  // Where the system forbids executable memory the interpreter does the same, slower.
  const bool jit = pcre2_jit_compile_8(code, PCRE2_JIT_COMPLETE) == 0;
  return Regex(std::move(owner), jit);
}

void RegexScan::FreeMatchData::operator()(pcre2_real_match_data_8* data) const { pcre2_match_data_free_8(data); }
void RegexScan::FreeMatchContext::operator()(pcre2_real_match_context_8* context) const {
  pcre2_match_context_free_8(context);
}

RegexScan::CpuTime RegexScan::Deadline(size_t text_bytes) {
  return ThreadCpuTime() + kBaseTime + kTimePerByte * static_cast<int64_t>(text_bytes);
}

RegexScan::RegexScan(const Regex& regex, CpuTime deadline)
    : regex_(&regex),
      match_(pcre2_match_data_create_8(1, nullptr)),
      context_(pcre2_match_context_create_8(nullptr)),
      deadline_(deadline),
      last_clock_(ThreadCpuTime()),
      window_(kFirstWindow) {
  NIBBLE_CHECK(match_ != nullptr && context_ != nullptr, "out of memory");
  pcre2_set_heap_limit_8(context_.get(), kHeapLimitKiB);
}

void RegexScan::Start(std::string_view text) {
  text_ = text;
  position_ = 0;
  const uint64_t steps = kStepsPerAttempt + kStepsPerByte * text.size();
  pcre2_set_match_limit_8(context_.get(), static_cast<uint32_t>(std::min<uint64_t>(steps, UINT32_MAX)));
}

int RegexScan::Match(size_t from, size_t last_start) {
  pcre2_set_offset_limit_8(context_.get(), last_start);
  // The text was validated once; checking it again at every match would be quadratic.
  const auto* subject = reinterpret_cast<PCRE2_SPTR8>(text_.data());
  int result = PCRE2_ERROR_JIT_STACKLIMIT;
  if (regex_->jit_)
    result = pcre2_jit_match_8(regex_->code_.get(), subject, text_.size(), from, PCRE2_NO_UTF_CHECK, match_.get(),
                               context_.get());
  if (result == PCRE2_ERROR_JIT_STACKLIMIT)
    result = pcre2_match_8(regex_->code_.get(), subject, text_.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                           match_.get(), context_.get());
  return result;
}

bool RegexScan::Next(size_t* begin, size_t* end) {
  if (!status_.ok()) return false;
  size_t from = position_;
  while (from < text_.size()) {
    if (++calls_to_clock_ >= kCallsPerClock) {
      calls_to_clock_ = 0;
      last_clock_ = ThreadCpuTime();
      if (last_clock_ > deadline_) return Exceeded("time");
    }
    const size_t last_start = std::min(from + window_, text_.size());
    const int result = Match(from, last_start);
    if (result > 0) {
      const PCRE2_SIZE* match = pcre2_get_ovector_pointer_8(match_.get());
      if (match[1] <= match[0] || match[0] < position_) {
        status_ = absl::InternalError("regular expression matched an empty or reversed range");
        return false;
      }
      *begin = match[0];
      *end = position_ = match[1];
      return true;
    }
    switch (result) {
      case PCRE2_ERROR_NOMATCH: {
        const CpuTime now = ThreadCpuTime();
        if (now > deadline_) return Exceeded("time");
        // Resume behind the window, at the beginning of a character.
        from = last_start + 1;
        while (from < text_.size() && (static_cast<uint8_t>(text_[from]) & 0xC0) == 0x80) ++from;
        window_ = now - last_clock_ < kQuick ? std::min(window_ * 4, kLargestWindow) : kFirstWindow;
        last_clock_ = now;
        break;
      }
      case PCRE2_ERROR_MATCHLIMIT:
        return Exceeded("step");
      case PCRE2_ERROR_DEPTHLIMIT:
      case PCRE2_ERROR_HEAPLIMIT:
      case PCRE2_ERROR_NOMEMORY:
      case PCRE2_ERROR_JIT_STACKLIMIT:
        return Exceeded("memory");
      default:
        status_ = absl::InternalError(fmt::format("PCRE2 reports error {}", result));
        return false;
    }
  }
  position_ = text_.size();
  return false;
}

bool RegexScan::Exceeded(std::string_view limit) {
  status_ = absl::ResourceExhaustedError(fmt::format(
      "the tokenizer's regular expression exceeded its {} limit on a text of {} bytes", limit, text_.size()));
  return false;
}

}  // namespace nibble
