#include "common/text/utf8.h"

#include <cstring>

namespace nibble {

Utf8Step ReadUtf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {Utf8Step::kCharacter, 1, first};
  if (first < 0xC2 || first > 0xF4) return {Utf8Step::kInvalid, 1, 0};

  const uint8_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  char32_t code_point = first & (0xFFu >> (length + 1));
  for (uint8_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Step::kTruncated, i, 0};
    // Only the second byte has a narrower range: it rules out overlong forms, surrogates and code points above
    // U+10FFFF.
    const uint8_t low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (byte(i) < low || byte(i) > high) return {Utf8Step::kInvalid, i, 0};
    code_point = code_point << 6 | (byte(i) & 0x3Fu);
  }
  return {Utf8Step::kCharacter, length, code_point};
}

size_t ValidUtf8Prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t word;
    if (i + sizeof(word) <= text.size()) {
      std::memcpy(&word, text.data() + i, sizeof(word));
      if ((word & 0x8080808080808080u) == 0) {
        i += sizeof(word);
        continue;
      }
    }
    const Utf8Step step = ReadUtf8(text.substr(i));
    if (step.kind != Utf8Step::kCharacter) break;
    i += step.length;
  }
  return i;
}

size_t AppendUtf8Lossy(std::string_view bytes, std::string* text) {
  while (!bytes.empty()) {
    const size_t valid = ValidUtf8Prefix(bytes);
    text->append(bytes.substr(0, valid));
    bytes.remove_prefix(valid);
    if (bytes.empty()) break;
    const Utf8Step step = ReadUtf8(bytes);
    if (step.kind == Utf8Step::kTruncated) return bytes.size();
    text->append(kReplacementCharacter);
    bytes.remove_prefix(step.length);
  }
  return 0;
}

std::string Excerpt(std::string_view text, size_t max_bytes) {
  const size_t length = ValidUtf8Prefix(text.substr(0, max_bytes));
  return std::string(text.substr(0, length)) + (length < text.size() ? "..." : "");
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

void AppendUtf8(char32_t c, std::string* text) {
  if (c < 0x80) {
    text->push_back(static_cast<char>(c));
    return;
  }
  if (c < 0x800) {
    text->push_back(static_cast<char>(0xC0 | c >> 6));
  } else {
    if (c < 0x10000) {
      text->push_back(static_cast<char>(0xE0 | c >> 12));
    } else {
      text->push_back(static_cast<char>(0xF0 | c >> 18));
      text->push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    }
    text->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
  }
  text->push_back(static_cast<char>(0x80 | (c & 0x3F)));
}

}  // namespace nibble
