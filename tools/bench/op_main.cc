// nibble-bench-op: `nibble-bench op` alone, without gRPC, for machines that have a GPU and little else.
#include <CLI/CLI.hpp>
#include <iostream>

#include "absl/strings/str_join.h"
#include "common/base/version.h"
#include "tools/bench/op.h"

int main(int argc, char** argv) {
  CLI::App app("nibble-bench-op: time and check the operators of one backend", "nibble-bench-op");
  app.set_version_flag("--version", nibble::kVersion);
  nibble::OpFlags flags;
  nibble::AddOpFlags(&app, &flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return nibble::OpCommand(flags, absl::StrJoin(argv, argv + argc, " "), std::cout, std::cerr);
}
