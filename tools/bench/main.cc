// nibble-bench: measure a running system, or the operators of a backend. One subcommand per thing that can be measured.
#include <CLI/CLI.hpp>
#include <iostream>

#include "absl/strings/str_join.h"
#include "common/base/version.h"
#include "tools/bench/op.h"
#include "tools/bench/serve.h"
#include "tools/client/interrupt.h"
#include "tools/client/rpc_error.h"

int main(int argc, char** argv) {
  nibble::Interrupt interrupt;  // before gRPC starts threads

  CLI::App app("nibble-bench: measure a running nibble, or its operators", "nibble-bench");
  app.set_version_flag("--version", nibble::kVersion);
  app.require_subcommand(1);

  CLI::App* serve = app.add_subcommand("serve", "Open-loop load over gRPC; the numbers of `vllm bench serve`");
  nibble::ServeFlags serve_flags;
  nibble::AddServeFlags(serve, &serve_flags);
  CLI::App* op = app.add_subcommand("op", "Time and check the operators of one backend, on this machine");
  nibble::OpFlags op_flags;
  nibble::AddOpFlags(op, &op_flags);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? int{nibble::kExitOk} : int{nibble::kExitUsage};
  }
  if (*op) return nibble::OpCommand(op_flags, absl::StrJoin(argv, argv + argc, " "), std::cout, std::cerr);
  return nibble::ServeCommand(serve_flags, std::cout, std::cerr, &interrupt);
}
