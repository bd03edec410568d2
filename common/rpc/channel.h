// A gRPC channel with the project's options: finds out within seconds that the other side is gone, comes back within
// one.
#pragma once

#include <grpcpp/channel.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/rpc/tls.h"

namespace nibble {

struct ChannelOptions {
  TlsOptions tls;
  int max_receive_message_bytes = 64 << 20;
  int max_send_message_bytes = 64 << 20;
  std::chrono::milliseconds keepalive_time{10000};
  std::chrono::milliseconds keepalive_timeout{5000};
  std::chrono::milliseconds min_reconnect_backoff{100};
  std::chrono::milliseconds max_reconnect_backoff{1000};
};

// `address` is HOST:PORT with a port above 0. Connects lazily; every channel has its own connection. gRPC's own retries
// and the http_proxy variable are off: the caller decides what is sent again, and workers are never behind a web proxy.
absl::StatusOr<std::shared_ptr<grpc::Channel>> CreateChannel(const std::string& address,
                                                             const ChannelOptions& options = {});

}  // namespace nibble
