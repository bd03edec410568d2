#include "common/rpc/server.h"

#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>
#include <spdlog/fmt/fmt.h>

#include <mutex>
#include <utility>

#include "common/base/line_budget.h"
#include "common/base/log.h"
#include "common/base/status.h"

namespace nibble {
namespace {

constexpr int kGrpcErrorsPerSecond = 10;

// gRPC's own lines join ours. Its errors are mostly about peers (a failed handshake, a reset), so they warn.
void ForwardGrpcLog(gpr_log_func_args* args) {
  const char* slash = args->file;
  for (const char* p = args->file; *p != '\0'; ++p) {
    if (*p == '/') slash = p + 1;
  }
  if (args->severity == GPR_LOG_SEVERITY_ERROR) {
    static LineBudget budget(kGrpcErrorsPerSecond);
    uint64_t left_out = 0;
    if (!budget.Take(LineBudget::Clock::now(), &left_out)) return;
    LogWarn("grpc {}:{} {}", slash, args->line, args->message);
    if (left_out > 0) LogWarn("grpc errors left_out={} limit_per_second={}", left_out, kGrpcErrorsPerSecond);
  } else {
    LogDebug("grpc {}:{} {}", slash, args->line, args->message);
  }
}

void InitGrpcOnce() {
  static std::once_flag once;
  std::call_once(once, [] {
    gpr_set_log_function(&ForwardGrpcLog);
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(const RpcServerOptions& options,
                                                            std::span<grpc::Service* const> services) {
  InitGrpcOnce();
  NIBBLE_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options.listen));
  NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<grpc::ServerCredentials> credentials, MakeServerCredentials(options.tls));
  NIBBLE_RETURN_IF_ERROR(CheckCanListen(address));

  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address.ToString(), credentials, &port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(options.max_receive_message_bytes);
  builder.SetMaxSendMessageSize(options.max_send_message_bytes);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  const auto set = [&](const char* name, int64_t value) { builder.AddChannelArgument(name, static_cast<int>(value)); };
  set(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers on one port would each get half of the clients
  set(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  set(GRPC_ARG_MAX_METADATA_SIZE, 16 << 10);
  set(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000);
  set(GRPC_ARG_KEEPALIVE_TIME_MS, options.keepalive_time.count());
  set(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, options.keepalive_timeout.count());
  set(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  set(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // on a silent stream pings are all there is
  // Clients may ping twice as often as we do before they are called abusive.
  set(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, options.keepalive_time.count() / 2);

  std::unique_ptr<RpcServer> server(new RpcServer);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return absl::UnavailableError(
        fmt::format("cannot listen on {}: the port was taken just now{}", address.ToString(),
                    options.tls.enabled() ? ", or TLS certificate and private key do not belong together" : ""));
  }
  address.port = static_cast<uint16_t>(port);
  server->address_ = std::move(address);
  server->server_->GetHealthCheckService()->SetServingStatus(false);
  return server;
}

RpcServer::~RpcServer() { Shutdown(std::chrono::milliseconds(0)); }

void RpcServer::SetServing(const std::string& service, bool serving) {
  if (server_ != nullptr) server_->GetHealthCheckService()->SetServingStatus(service, serving);
}

void RpcServer::Shutdown(std::chrono::milliseconds grace) {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now() + grace);
  server_->Wait();
  server_.reset();
}

}  // namespace nibble
