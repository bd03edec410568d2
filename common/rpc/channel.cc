#include "common/rpc/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/support/channel_arguments.h>
#include <spdlog/fmt/fmt.h>

#include "common/base/address.h"
#include "common/base/status.h"

namespace nibble {

absl::StatusOr<std::shared_ptr<grpc::Channel>> CreateChannel(const std::string& address,
                                                             const ChannelOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const HostPort target, ParseHostPort(address));
  if (target.port == 0)
    return absl::InvalidArgumentError(fmt::format("'{}' has port 0, which nobody listens on", address));
  NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<grpc::ChannelCredentials> credentials, MakeChannelCredentials(options.tls));

  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(options.max_receive_message_bytes);
  arguments.SetMaxSendMessageSize(options.max_send_message_bytes);
  const auto set = [&](const char* name, int64_t value) { arguments.SetInt(name, static_cast<int>(value)); };
  set(GRPC_ARG_KEEPALIVE_TIME_MS, options.keepalive_time.count());
  set(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, options.keepalive_timeout.count());
  set(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  set(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  set(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, options.min_reconnect_backoff.count());
  set(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, options.max_reconnect_backoff.count());
  // Despite its name this is how long one attempt may take; its default of 20 s would hide a restarted peer.
  set(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);
  set(GRPC_ARG_ENABLE_RETRIES, 0);
  set(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  set(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(target.ToString(), credentials, arguments);
}

}  // namespace nibble
