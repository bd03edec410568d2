// nibble: talk to a running nibble-router.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <string>

#include "common/base/version.h"
#include "tools/cli/chat.h"
#include "tools/cli/generate.h"
#include "tools/cli/status.h"
#include "tools/client/interrupt.h"
#include "tools/client/rpc_error.h"
#include "tools/client/server_flags.h"

namespace {

constexpr char kFooter[] =
    "Exit codes: 0 done; 1 the server failed; 2 wrong command line; 3 the server refused the request; 4 not ready or\n"
    "overloaded, try again; 5 deadline passed; 130 interrupted. NIBBLE_SERVER sets the default of --server.";

}  // namespace

int main(int argc, char** argv) {
  nibble::Interrupt interrupt;  // before gRPC starts threads
  const nibble::Console console{.in = std::cin,
                                .out = std::cout,
                                .err = std::cerr,
                                .in_is_terminal = isatty(STDIN_FILENO) == 1,
                                .out_is_terminal = isatty(STDOUT_FILENO) == 1,
                                .err_is_terminal = isatty(STDERR_FILENO) == 1};

  CLI::App app("nibble: generate text with, chat with and look at a running nibble-router", "nibble");
  app.set_version_flag("--version", nibble::kVersion);
  app.require_subcommand(1);
  app.footer(kFooter);
  nibble::ServerFlags server;

  CLI::App* generate = app.add_subcommand("generate", "Continue a prompt; the text streams to stdout");
  nibble::GenerateFlags generate_flags;
  nibble::AddGenerateFlags(generate, &generate_flags);
  nibble::AddServerFlags(generate, &server);

  CLI::App* chat = app.add_subcommand("chat", "A conversation; every line of stdin is a message");
  nibble::ChatFlags chat_flags;
  nibble::AddChatFlags(chat, &chat_flags);
  nibble::AddServerFlags(chat, &server);

  CLI::App* status = app.add_subcommand("status", "Replicas, pages and queues; exit code 0 when ready");
  nibble::StatusFlags status_flags;
  nibble::AddStatusFlags(status, &status_flags);
  nibble::AddServerFlags(status, &server);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? int{nibble::kExitOk} : int{nibble::kExitUsage};
  }

  const auto channel = nibble::OpenChannel(server);
  if (!channel.ok()) {
    console.Error(std::string(channel.status().message()));
    return nibble::kExitUsage;
  }
  const auto stub = nibble::v1::Inference::NewStub(*channel);
  if (generate->parsed()) return nibble::GenerateCommand(stub.get(), generate_flags, console, &interrupt);
  if (chat->parsed()) return nibble::ChatCommand(stub.get(), chat_flags, console, &interrupt);
  return nibble::StatusCommand(stub.get(), status_flags, console, &interrupt);
}
