#include "tools/client/server_flags.h"

#include <CLI/CLI.hpp>

#include "common/base/status.h"
#include "common/rpc/channel.h"

namespace nibble {

void AddServerFlags(CLI::App* app, ServerFlags* flags) {
  app->add_option("--server", flags->server, "Address of nibble-router, HOST:PORT")
      ->envname("NIBBLE_SERVER")
      ->capture_default_str()
      ->group("Connection");
  app->add_option("--tls-ca", flags->tls.ca_file, "PEM file of roots to verify the server with; turns TLS on")
      ->group("Connection");
  app->add_option("--tls-cert", flags->tls.certificate_file, "PEM client certificate (mutual TLS)")
      ->group("Connection");
  app->add_option("--tls-key", flags->tls.key_file, "PEM key of --tls-cert")->group("Connection");
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ServerFlags& flags) {
  auto channel = CreateChannel(flags.server, {.tls = flags.tls});
  if (!channel.ok()) return Annotate(channel.status(), "--server");
  return channel;
}

}  // namespace nibble
