// nibble-router: parse, start, wait for a signal, drain.
#include <cstdio>
#include <string>
#include <vector>

#include <google/protobuf/stubs/logging.h>

#include "common/base/file.h"
#include "common/base/log.h"
#include "common/base/signals.h"
#include "router/config.h"
#include "router/router.h"

namespace nibble {
namespace {

constexpr int kFailed = 1, kBadConfig = 2;

int Main(const std::vector<std::string>& arguments) {
  BlockShutdownSignals();
  const absl::StatusOr<CommandLine> line = ParseCommandLine(arguments);
  if (!line.ok()) {
    std::fprintf(stderr, "nibble-router: bad configuration:\n%s\n", std::string(line.status().message()).c_str());
    return kBadConfig;
  }
  if (!line->text.empty()) {
    std::fputs(line->text.c_str(), stdout);
    return 0;
  }
  const RouterConfig& config = line->config;
  if (absl::Status status = InitLogging("router", config.log_level); !status.ok()) {
    std::fprintf(stderr, "nibble-router: %s\n", std::string(status.message()).c_str());
    return kBadConfig;
  }
  // protobuf reports every message it cannot parse; whoever sent it is told, the log need not grow with it.
  google::protobuf::SetLogHandler(
      [](google::protobuf::LogLevel, const char*, int, const std::string& message) { LogDebug("protobuf {}", message); });
  const auto fail = [](const absl::Status& status) {
    LogError("cannot start code={} error=\"{}\"", absl::StatusCodeToString(status.code()), std::string(status.message()));
    return kFailed;
  };

  absl::StatusOr<std::unique_ptr<Router>> router = Router::Start(config);
  if (!router.ok()) return fail(router.status());
  const std::string metrics =
      (*router)->metrics_address().has_value() ? (*router)->metrics_address()->ToString() : "off";
  LogInfo("listening address={} metrics={} replicas={}", (*router)->address().ToString(), metrics,
          config.replicas.size());
  if (!config.port_file.empty()) {
    const std::string port = std::to_string((*router)->address().port) + "\n";
    if (absl::Status status = WriteFileAtomically(config.port_file, port); !status.ok()) return fail(status);
  }
  if (!config.metrics_port_file.empty() && (*router)->metrics_address().has_value()) {
    const std::string port = std::to_string((*router)->metrics_address()->port) + "\n";
    if (absl::Status status = WriteFileAtomically(config.metrics_port_file, port); !status.ok()) return fail(status);
  }

  const int signal = WaitForShutdownSignal();
  ExitOnNextShutdownSignal();
  LogInfo("draining signal={} timeout_s={}", signal, config.drain_timeout_s);
  (*router)->Stop(std::chrono::seconds(config.drain_timeout_s));
  LogInfo("stopped");
  return 0;
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) { return nibble::Main({argv + 1, argv + argc}); }
