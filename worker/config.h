// What an operator can set on a worker (common/settings/settings.h: how).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/rpc/tls.h"

namespace nibble {

struct WorkerConfig {
  std::string model_dir;
  std::string listen = "127.0.0.1:50061";
  std::string port_file;
  std::string metrics_listen;  // empty: none
  std::string metrics_port_file;
  std::string backend = "auto";  // "cpu", "cuda", "mock" or "auto"
  int threads = 0;               // 0: the machine's hardware threads divided by the group's size
  int device = 0;
  int64_t kv_memory_bytes = int64_t{512} << 20;
  int64_t mock_step_us = 0;
  std::string advertise_host = "127.0.0.1";
  int64_t collective_timeout_ms = 5000;
  int64_t drain_timeout_s = 30;
  TlsOptions tls;
  std::string log_level = "info";
};

struct WorkerCommandLine {
  WorkerConfig config;
  std::string text;  // of --help or --version: print it and exit 0
};

// `arguments` without the program's name. INVALID_ARGUMENT lists every problem, one per line.
absl::StatusOr<WorkerCommandLine> ParseWorkerCommandLine(const std::vector<std::string>& arguments);

}  // namespace nibble
