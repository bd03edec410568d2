// Unicode Normalization Form C (UAX #15), for tokenizers that ask for it (Qwen2). Tables: Unicode 14.
#pragma once

#include <string>
#include <string_view>

namespace nibble {

// True for text without any character that normalization could change: all of ASCII and most other text, at the price
// of one look into a bitmap per character above U+02FF. `text` is valid UTF-8.
bool IsSurelyNfc(std::string_view text);

// The text in Normalization Form C. `text` is valid UTF-8. O(n log n).
std::string ToNfc(std::string_view text);

}  // namespace nibble
