#include "common/metrics/server.h"

#include <prometheus/exposer.h>
#include <spdlog/fmt/fmt.h>

#include <exception>
#include <utility>
#include <vector>

#include "common/base/status.h"

namespace nibble {

MetricsServer::MetricsServer() = default;
MetricsServer::~MetricsServer() = default;

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& listen,
                                                                    const MetricRegistry& registry) {
  NIBBLE_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(listen));
  NIBBLE_RETURN_IF_ERROR(CheckCanListen(address));
  std::unique_ptr<MetricsServer> server(new MetricsServer);
  // civetweb throws when it cannot bind, and says only "null context".
  try {
    // Two threads and a short timeout: scrapers are few, and one that stops reading must not keep the others out for
    // long.
    server->exposer_ = std::make_unique<prometheus::Exposer>(std::vector<std::string>{
        "listening_ports", address.ToString(), "num_threads", "2", "request_timeout_ms", "5000"});
    server->exposer_->RegisterCollectable(registry.registry_);
    server->exposer_->RegisterCollectable(registry.process_);
    const std::vector<int> ports = server->exposer_->GetListeningPorts();
    if (ports.empty()) return absl::UnavailableError(fmt::format("cannot listen on {}", address.ToString()));
    address.port = static_cast<uint16_t>(ports.front());
  } catch (const std::exception& e) {
    return absl::UnavailableError(fmt::format("cannot listen on {}: {}", address.ToString(), e.what()));
  }
  server->address_ = std::move(address);
  return server;
}

}  // namespace nibble
