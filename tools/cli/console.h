// Where a command reads and writes. Results go to out, everything said about them to err.
#pragma once

#include <iosfwd>
#include <string>
#include <string_view>

namespace nibble {

struct Console {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
  bool in_is_terminal = false;
  bool out_is_terminal = false;
  bool err_is_terminal = false;

  // Text for err, dimmed (asides), red (errors); plain when err is no terminal.
  std::string Dim(std::string_view text) const;
  std::string Red(std::string_view text) const;
  // "error: " in red and the text, on a line of its own.
  void Error(std::string_view text) const;

  // Model text for out: as it is into a pipe, without control characters on a terminal. Flushes.
  void PrintText(std::string_view text) const;
};

}  // namespace nibble
