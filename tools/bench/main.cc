// nibble-bench: measure a running system. One subcommand per thing that can be measured.
#include <CLI/CLI.hpp>
#include <iostream>

#include "common/base/version.h"
#include "tools/bench/serve.h"
#include "tools/client/interrupt.h"
#include "tools/client/rpc_error.h"

int main(int argc, char** argv) {
  nibble::Interrupt interrupt;  // before gRPC starts threads

  CLI::App app("nibble-bench: measure a running nibble", "nibble-bench");
  app.set_version_flag("--version", nibble::kVersion);
  app.require_subcommand(1);

  CLI::App* serve = app.add_subcommand("serve", "Open-loop load over gRPC; the numbers of `vllm bench serve`");
  nibble::ServeFlags serve_flags;
  nibble::AddServeFlags(serve, &serve_flags);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? int{nibble::kExitOk} : int{nibble::kExitUsage};
  }
  return nibble::ServeCommand(serve_flags, std::cout, std::cerr, &interrupt);
}
