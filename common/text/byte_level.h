// The spelling of bytes in byte-level vocabularies: each byte is one printable character, so that tokens fit in JSON.
// Source: bytes_to_unicode in openai/gpt-2 src/encoder.py. Printable Latin-1 stands for itself; the 68 other bytes are
// U+0100 upwards in byte order (space is U+0120 "Ġ", line feed U+010A "Ċ").
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nibble {

// The bytes that `spelling` (valid UTF-8) stands for; nothing when it contains a character outside of the alphabet.
std::optional<std::string> BytesFromSpelling(std::string_view spelling);

}  // namespace nibble
