// What an operator can set on a router (common/settings/settings.h: how).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

struct RouterConfig {
  std::string model_dir;                        // tokenizer.json, config.json; the tensors when they are there
  std::string listen = "127.0.0.1:50051";         // port 0: the kernel chooses
  std::string metrics_listen = "127.0.0.1:9400";  // /metrics; empty: none
  std::string port_file;                        // written once the port is known
  std::string metrics_port_file;
  std::string log_level = "info";
  std::vector<std::vector<std::string>> replicas;  // addresses of each replica's workers, rank order

  // One step.
  uint32_t max_sequences = 256;         // slots of a replica
  uint32_t max_step_tokens = 2048;      // rows of one plan
  uint32_t max_prefill_chunk = 512;     // of one sequence in one plan
  bool run_ahead = true;
  bool prefix_cache = true;

  // Admission: what waits.
  uint32_t max_waiting_requests = 1024;
  uint64_t max_waiting_tokens = 4u << 20;

  // Output.
  uint32_t output_threads = 2;
  uint32_t tokenizer_threads = 2;
  uint32_t max_buffered_tokens = 4096;  // of one stream whose client does not read
  uint32_t slow_client_timeout_s = 60;  // of a finished stream whose client does not read

  // Failure.
  uint32_t step_timeout_ms = 5000;      // a due result that does not come
  uint32_t load_timeout_s = 1800;       // Prepare: reading a shard from disk
  uint32_t join_timeout_s = 60;         // Join: the group's rendezvous
  uint32_t ping_interval_ms = 1000;     // GetInfo while the replica serves
  uint32_t replay_wait_ms = 0;          // how long a sequence waits for a ready replica
  uint32_t drain_timeout_s = 45;

  // TLS: client side of the router, then towards the workers. Empty: plaintext.
  std::string tls_cert, tls_key, tls_client_ca;
  std::string worker_tls_ca, worker_tls_cert, worker_tls_key;
};

struct CommandLine {
  RouterConfig config;
  std::string text;  // of --help or --version: print it and exit 0
};

// `arguments` without the program's name. INVALID_ARGUMENT lists every problem, one per line.
absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments);

}  // namespace nibble
