#include "tools/cli/console.h"

#include <ostream>

#include "tools/client/terminal_text.h"

namespace nibble {

std::string Console::Dim(std::string_view text) const {
  return err_is_terminal ? "\x1b[2m" + std::string(text) + "\x1b[0m" : std::string(text);
}

std::string Console::Red(std::string_view text) const {
  return err_is_terminal ? "\x1b[31m" + std::string(text) + "\x1b[0m" : std::string(text);
}

void Console::Error(std::string_view text) const { err << Red("error:") << " " << text << std::endl; }

void Console::PrintText(std::string_view text) const {
  if (text.empty()) return;
  if (out_is_terminal) {
    out << ForTerminal(text);
  } else {
    out << text;
  }
  out.flush();
}

}  // namespace nibble
