// Serves a registry as GET /metrics, in the Prometheus text format.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/base/address.h"
#include "common/metrics/registry.h"

namespace prometheus {
class Exposer;
}

namespace nibble {

class MetricsServer {
 public:
  // `listen` is HOST:PORT, port 0 = any free one. UNAVAILABLE "cannot listen on ..." when the port is taken.
  // `registry` outlives the server.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& listen,
                                                              const MetricRegistry& registry);
  ~MetricsServer();

  // Where it listens, with the port the kernel chose.
  const HostPort& address() const { return address_; }

 private:
  MetricsServer();
  HostPort address_;
  std::unique_ptr<prometheus::Exposer> exposer_;
};

}  // namespace nibble
