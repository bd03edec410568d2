// The flags that every client command has: where the router is and how to reach it.
#pragma once

#include <grpcpp/channel.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/rpc/tls.h"

namespace CLI {
class App;
}

namespace nibble {

struct ServerFlags {
  std::string server = "127.0.0.1:50051";
  TlsOptions tls;
};
void AddServerFlags(CLI::App* app, ServerFlags* flags);

// One connection per call; connects when the first RPC is made. Errors are the command line's.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ServerFlags& flags);

}  // namespace nibble
