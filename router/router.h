// A whole nibble-router in one object: what main starts, drains and ends, and what a test can run in its own process.
#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "common/base/address.h"
#include "common/metrics/registry.h"
#include "common/metrics/server.h"
#include "common/rpc/server.h"
#include "common/text/tokenizer.h"
#include "router/config.h"
#include "router/fleet.h"
#include "router/intake.h"
#include "router/output_pool.h"
#include "router/request_metrics.h"
#include "router/service.h"

namespace nibble {

class Router {
 public:
  // Loads the model's tokenizer, listens, starts to form the replicas. Does not wait for them: until one is ready health
  // says NOT_SERVING and Generate UNAVAILABLE.
  static absl::StatusOr<std::unique_ptr<Router>> Start(const RouterConfig& config);
  ~Router();  // Stop(0)

  const HostPort& address() const { return server_->address(); }
  // Nothing when there are no metrics.
  std::optional<HostPort> metrics_address() const;

  // Health says NOT_SERVING, new requests are UNAVAILABLE, running ones may end within `grace`; then everything ends.
  // Once.
  void Stop(std::chrono::milliseconds grace);

 private:
  Router() = default;
  void SetReady(bool ready);

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Intake> intake_;
  MetricRegistry metrics_;
  std::unique_ptr<RequestMetrics> request_metrics_;
  std::unique_ptr<MetricsServer> metrics_server_;
  std::unique_ptr<OutputPool> output_;
  std::unique_ptr<Fleet> fleet_;
  std::unique_ptr<InferenceService> service_;

  std::mutex serving_mutex_;               // below
  bool draining_ = false;
  std::unique_ptr<RpcServer> server_;
};

}  // namespace nibble
