// `nibble-quantize import`.
#pragma once

#include <CLI/CLI.hpp>

#include "tools/quantize/import_model.h"

namespace nibble {

struct ImportCommand {
  ImportOptions options;

  // Adds the subcommand; it was given when app.got_subcommand("import").
  void Register(CLI::App* app);
  // Progress on stderr, a summary on stdout; the process's exit status.
  int Run();
};

}  // namespace nibble
