#include "tools/client/terminal_text.h"

#include <cstdint>

namespace nibble {

std::string ForTerminal(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const uint8_t c = static_cast<uint8_t>(text[i]);
    if (c == '\n' || c == '\t' || (c >= 0x20 && c != 0x7F && c != 0xC2)) {
      out += text[i];
    } else if (c == 0xC2) {  // C1 controls U+0080..U+009F are C2 80..C2 9F; some terminals obey them
      const bool c1 = i + 1 < text.size() && static_cast<uint8_t>(text[i + 1]) < 0xA0;
      out += c1 ? "\xEF\xBF\xBD" : text.substr(i, 2);
      ++i;
    } else {
      out += "\xE2\x90";
      out += static_cast<char>(c == 0x7F ? 0xA1 : 0x80 + c);
    }
  }
  return out;
}

size_t Columns(std::string_view text) {
  size_t columns = 0;
  for (const char c : text) columns += (static_cast<uint8_t>(c) & 0xC0) != 0x80;
  return columns;
}

}  // namespace nibble
