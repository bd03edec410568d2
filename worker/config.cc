#include "worker/config.h"

#include <spdlog/fmt/fmt.h>

#include <filesystem>
#include <system_error>

#include "common/base/status.h"
#include "common/settings/settings.h"

namespace nibble {
namespace {

std::vector<Setting> Settings(WorkerConfig* c) {
  constexpr int64_t kDay_s = 86400;
  return {
      Setting::Text("model", "DIR", "model directory: config.json and tensors; mock reads config.json alone",
                    &c->model_dir),
      Setting::Address("listen", "address routers reach this worker at; port 0: any free one", &c->listen, false),
      Setting::Text("port-file", "FILE", "write the port here once the worker serves", &c->port_file),
      Setting::Address("metrics-listen", "address of /metrics; empty: none", &c->metrics_listen, true),
      Setting::Text("metrics-port-file", "FILE", "write the metrics port here once the worker serves",
                    &c->metrics_port_file),
      Setting::Choice("backend", "what computes; auto: cuda when there is one, else cpu",
                      {"auto", "cpu", "cuda", "mock"}, &c->backend),
      Setting::Number("threads",
                      "CPU threads; 0: the machine's, divided by the ranks of the group (they are taken to share it)",
                      0, 1024, &c->threads),
      Setting::Number("device", "CUDA device ordinal", 0, 1023, &c->device),
      Setting::Size("kv-memory", "memory of the KV page pool, such as 64MiB or 2GiB", &c->kv_memory_bytes),
      Setting::Number("mock-step-us", "duration of a step of the mock backend, microseconds", 0, 60 * 1000 * 1000,
                      &c->mock_step_us),
      Setting::Text("advertise-host", "HOST", "own address the other ranks of a group connect to", &c->advertise_host),
      Setting::Number("collective-timeout-ms",
                      "a peer that is silent this long inside a collective or rendezvous has failed", 10, 600 * 1000,
                      &c->collective_timeout_ms),
      Setting::Number("drain-timeout-s", "how long SIGTERM waits for running sequences", 0, kDay_s,
                      &c->drain_timeout_s),
      Setting::Text("tls-cert", "FILE", "certificate chain (PEM); none: plaintext", &c->tls.certificate_file),
      Setting::Text("tls-key", "FILE", "private key of --tls-cert (PEM)", &c->tls.key_file),
      Setting::Text("tls-client-ca", "FILE", "demand client certificates signed by this CA (PEM)", &c->tls.ca_file),
      Setting::LogLevel(&c->log_level),
  };
}

void CheckTogether(const WorkerConfig& c, std::vector<std::string>* problems) {
  std::error_code error;
  if (c.model_dir.empty()) {
    problems->push_back("model is not set, must be a model directory");
  } else if (!std::filesystem::is_directory(c.model_dir, error)) {
    problems->push_back(fmt::format("model is '{}', must be a directory", c.model_dir));
  }
  if (c.tls.certificate_file.empty() != c.tls.key_file.empty()) {
    problems->push_back("tls-cert and tls-key must be set together");
  }
  if (!c.tls.ca_file.empty() && c.tls.certificate_file.empty()) {
    problems->push_back("tls-client-ca needs tls-cert and tls-key");
  }
  if (c.mock_step_us > 0 && c.backend != "mock") problems->push_back("mock-step-us needs backend mock");
}

}  // namespace

absl::StatusOr<WorkerCommandLine> ParseWorkerCommandLine(const std::vector<std::string>& arguments) {
  WorkerCommandLine line;
  WorkerConfig* const config = &line.config;
  NIBBLE_ASSIGN_OR_RETURN(
      line.text,
      ParseSettings({.name = "nibble-worker", .description = "one shard of a model, executing the router's plans"},
                    Settings(config), arguments,
                    [config](std::vector<std::string>* problems) { CheckTogether(*config, problems); }));
  return line;
}

}  // namespace nibble
