// UTF-8 at the edges: validation with the offset of the first error, and the lossy conversion that models' outputs
// need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nibble {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// What stands at the front of a non-empty text. The well-formed sequences are those of Unicode table 3-7 (no
// surrogates, no overlong forms, nothing above U+10FFFF).
struct Utf8Step {
  enum Kind : uint8_t {
    kCharacter,  // a character of `length` bytes
    kInvalid,    // `length` bytes that can begin no character: the maximal subpart to be replaced by one U+FFFD
    kTruncated,  // the text ends inside a character that is well-formed so far; `length` is all of it
  };
  Kind kind;
  uint8_t length;       // bytes, 1..4
  char32_t code_point;  // kCharacter only
};
Utf8Step ReadUtf8(std::string_view text);

// Length in bytes of the longest prefix of whole, valid characters: text.size() when all is valid.
size_t ValidUtf8Prefix(std::string_view text);

// Appends `bytes` with every invalid part replaced by U+FFFD. A truncated character at the end is not appended: the
// length of that tail (0..3 bytes) is returned, for the caller to complete or to replace.
size_t AppendUtf8Lossy(std::string_view bytes, std::string* text);

// The beginning of `text` for a message: whole, valid characters of at most `max_bytes`, and "..." when something is
// missing.
std::string Excerpt(std::string_view text, size_t max_bytes = 64);

// The Unicode property White_Space.
bool IsWhiteSpace(char32_t code_point);

// Appends the UTF-8 form of a scalar value (not a surrogate, at most U+10FFFF).
void AppendUtf8(char32_t code_point, std::string* text);

}  // namespace nibble
