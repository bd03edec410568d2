// A gRPC server with the project's options: bounds on everything, grpc.health.v1, reflection, TLS, and an error that
// names the address when it cannot listen.
#pragma once

#include <grpcpp/server.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "common/base/address.h"
#include "common/rpc/tls.h"

namespace nibble {

struct RpcServerOptions {
  std::string listen;  // HOST:PORT, port 0 = any free one
  TlsOptions tls;
  int max_receive_message_bytes = 4 << 20;  // larger ones are RESOURCE_EXHAUSTED before they are parsed
  int max_send_message_bytes = 64 << 20;
  int max_concurrent_streams = 8192;                  // per connection; more wait in the client
  std::chrono::milliseconds keepalive_time{10000};    // ping after that much silence...
  std::chrono::milliseconds keepalive_timeout{5000};  // ...and drop the connection when no answer comes
};

class RpcServer {
 public:
  // `services` outlive the server. Compressed requests are refused: a few KiB could unfold to GiB.
  // "" and every service start as SERVING in grpc.health.v1 only after SetServing; before, they are NOT_SERVING.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(const RpcServerOptions& options,
                                                          std::span<grpc::Service* const> services);
  ~RpcServer();  // Shutdown(0)

  // Where it listens, with the port the kernel chose.
  const HostPort& address() const { return address_; }

  // grpc.health.v1: "" is the process, a full service name is that service.
  void SetServing(const std::string& service, bool serving);

  // Refuses new calls, waits for the running ones, cancels those that are left after `grace`, returns when all are
  // done. Once.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  RpcServer() = default;
  HostPort address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace nibble
