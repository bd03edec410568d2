// Text on its way to a terminal.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace nibble {

// A model may write anything, escape sequences included: for a terminal, control characters other than newline and
// tab become their pictures (U+2400..), so that text cannot move the cursor or change the title.
std::string ForTerminal(std::string_view text);

// Columns of a terminal that text takes, counting every character as one.
size_t Columns(std::string_view text);

}  // namespace nibble
