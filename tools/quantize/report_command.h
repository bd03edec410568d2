// `nibble-quantize report`.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "tools/quantize/report.h"

namespace nibble {

struct ReportCommand {
  ReportOptions options;
  std::string html;
  std::string json;

  // Adds the subcommand; it was given when app.got_subcommand("report").
  void Register(CLI::App* app);
  // Text on stdout, files where asked for; the process's exit status.
  int Run();
};

}  // namespace nibble
