// nibble-worker: one shard of a model behind worker.proto. Exit status: 0 after a drain, 1 when it cannot serve, 2 for
// a wrong configuration, 128 + n when a second signal n cut the drain short.
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/base/file.h"
#include "common/base/log.h"
#include "common/base/signals.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/metrics/server.h"
#include "common/model/checkpoint.h"
#include "common/rpc/server.h"
#include "worker/config.h"
#include "worker/membership.h"
#include "worker/mock_engine.h"
#include "worker/model_backend.h"
#include "worker/service.h"

namespace nibble {
namespace {

// A step's results are small; a plan may start many sequences with long prompts at once.
constexpr int kMaxPlanBytes = 64 << 20;

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const WorkerConfig& config) {
  if (config.backend != "mock") {
    return MakeModelBackend(config.model_dir,
                            {.backend = config.backend,
                             .threads = config.threads,
                             .device = config.device,
                             .advertise_host = config.advertise_host,
                             .collective_timeout = std::chrono::milliseconds(config.collective_timeout_ms)});
  }
  NIBBLE_ASSIGN_OR_RETURN(const ModelConfig model, LoadModelConfig(config.model_dir));
  // With tensors at hand the mock takes part in the check that all processes serve one model.
  const auto checkpoint = Checkpoint::Open(config.model_dir);
  return MakeMockBackend({.model = DescribeModel(model, checkpoint.ok() ? (*checkpoint)->Fingerprint() : ""),
                          .head_dim = model.head_dim,
                          .step_time = std::chrono::microseconds(config.mock_step_us)});
}

absl::Status WritePort(const std::string& file, const HostPort& address) {
  if (file.empty()) return absl::OkStatus();
  return WriteFileAtomically(file, fmt::format("{}\n", address.port));
}

// Everything after this many seconds is a bug or a hung device; the supervisor must not have to wait for it.
void ExitLateDrain(std::chrono::seconds limit) {
  std::thread([limit] {
    std::this_thread::sleep_for(limit);
    LogError("drain did not end limit_s={}", limit.count());
    _exit(1);
  }).detach();
}

absl::Status Serve(const WorkerConfig& config) {
  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeBackend(config));
  MetricRegistry registry;
  WorkerMetrics metrics(&registry, backend->name(), backend->model().name());
  Membership membership(backend.get(), &metrics, config.kv_memory_bytes);
  WorkerService service(&membership);

  RpcServerOptions options;
  options.listen = config.listen;
  options.tls = config.tls;
  options.max_receive_message_bytes = kMaxPlanBytes;
  grpc::Service* services[] = {&service};
  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<RpcServer> server, RpcServer::Start(options, services));
  std::unique_ptr<MetricsServer> metrics_server;
  if (!config.metrics_listen.empty()) {
    auto started = MetricsServer::Start(config.metrics_listen, registry);
    if (!started.ok()) return Annotate(started.status(), "metrics");
    metrics_server = *std::move(started);
  }
  NIBBLE_RETURN_IF_ERROR(WritePort(config.port_file, server->address()));
  if (metrics_server != nullptr) NIBBLE_RETURN_IF_ERROR(WritePort(config.metrics_port_file, metrics_server->address()));
  server->SetServing("", true);
  server->SetServing(kWorkerServiceName, true);
  LogInfo(
      "worker ready version={} listen={} metrics={} backend={} device=\"{}\" model={} quantization={} "
      "kv_memory_bytes={}",
      kVersion, server->address().ToString(), metrics_server == nullptr ? "none" : metrics_server->address().ToString(),
      backend->name(), backend->device(), backend->model().name(), backend->model().quantization(),
      config.kv_memory_bytes);

  const int signal = WaitForShutdownSignal();
  ExitOnNextShutdownSignal();
  LogInfo("draining signal={} timeout_s={}", signal, config.drain_timeout_s);
  const std::chrono::seconds drain_timeout(config.drain_timeout_s);
  ExitLateDrain(drain_timeout + std::chrono::seconds(10));
  server->SetServing(kWorkerServiceName, false);
  const bool clean = membership.Drain(drain_timeout);
  server->SetServing("", false);
  server->Shutdown(std::chrono::milliseconds(500));
  LogInfo("stopped sequences_left={}", clean ? "no" : "yes");
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  BlockShutdownSignals();
  const auto line = ParseWorkerCommandLine(std::vector<std::string>(argv + 1, argv + argc));
  if (!line.ok()) {
    std::fprintf(stderr, "nibble-worker: wrong configuration:\n%s\n", std::string(line.status().message()).c_str());
    return 2;
  }
  if (!line->text.empty()) {
    std::fputs(line->text.c_str(), stdout);
    return 0;
  }
  const WorkerConfig& config = line->config;
  if (const absl::Status status = InitLogging("worker", config.log_level); !status.ok()) {
    std::fprintf(stderr, "nibble-worker: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  if (const absl::Status status = Serve(config); !status.ok()) {
    LogError("cannot serve: {}", std::string(status.message()));
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) { return nibble::Main(argc, argv); }
