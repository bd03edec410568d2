#include "router/config.h"

#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "common/settings/settings.h"

namespace nibble {
namespace {

std::vector<Setting> Settings(RouterConfig* c) {
  constexpr int64_t kDay_s = 86400;
  return {
      Setting::Text("model", "DIR", "model directory: tokenizer.json and config.json", &c->model_dir),
      Setting::Address("listen", "address of the client API; port 0 lets the kernel choose", &c->listen, false),
      Setting::Address("metrics-listen", "address of /metrics; empty: none", &c->metrics_listen, true),
      Setting::Text("port-file", "FILE", "write the client API's port here once it is known", &c->port_file),
      Setting::Text("metrics-port-file", "FILE", "write the metrics port here once it is known", &c->metrics_port_file),
      {"replica", "HOST:PORT,...", "workers of one replica in rank order; once per replica",
       [c](const std::vector<std::string>& values) -> std::string {
         c->replicas.clear();
         for (const std::string& value : values) {
           c->replicas.push_back(absl::StrSplit(value, ','));
           for (const std::string& address : c->replicas.back()) {
             if (std::string problem = CheckAddress(address, /*may_be_port_0=*/false); !problem.empty()) return problem;
           }
         }
         return "";
       }},
      Setting::Number("max-sequences", "sequences running on one replica", 1, 4096, &c->max_sequences),
      Setting::Number("max-step-tokens", "token budget of one step", 1, 65536, &c->max_step_tokens),
      Setting::Number("max-prefill-chunk", "prompt tokens of one sequence in one step", 1, 65536,
                      &c->max_prefill_chunk),
      Setting::Switch("run-ahead", "send the next plan before the tokens of the last one are back", &c->run_ahead),
      Setting::Switch("prefix-cache", "reuse the KV pages of equal prompt prefixes", &c->prefix_cache),
      Setting::Number("max-waiting-requests", "sequences beyond the replicas' slots; more are refused", 1, 1 << 20,
                      &c->max_waiting_requests),
      Setting::Number("max-waiting-tokens", "prompt tokens waiting, all replicas", 1, int64_t{1} << 40,
                      &c->max_waiting_tokens),
      Setting::Number("output-threads", "threads that turn ids into text", 1, 64, &c->output_threads),
      Setting::Number("tokenizer-threads", "threads that encode long prompts", 1, 64, &c->tokenizer_threads),
      Setting::Number("max-buffered-tokens", "tokens kept for a client that does not read; more cancels its request",
                      16, 1 << 24, &c->max_buffered_tokens),
      Setting::Number("slow-client-timeout-s", "how long the end of a stream waits for its client to read", 1, kDay_s,
                      &c->slow_client_timeout_s),
      Setting::Number("step-timeout-ms", "a step's result this late takes its replica down", 10, kDay_s * 1000,
                      &c->step_timeout_ms),
      Setting::Number("load-timeout-s", "longest load of a worker's shard", 1, kDay_s, &c->load_timeout_s),
      Setting::Number("join-timeout-s", "longest rendezvous of a replica's workers", 1, kDay_s, &c->join_timeout_s),
      Setting::Number("ping-interval-ms", "how often a serving worker is asked whether it is still the same", 10,
                      kDay_s * 1000, &c->ping_interval_ms),
      Setting::Number("replay-wait-ms", "how long a request waits when no replica is ready for it", 0, kDay_s * 1000,
                      &c->replay_wait_ms),
      Setting::Number("drain-timeout-s", "how long SIGTERM waits for running requests", 0, kDay_s, &c->drain_timeout_s),
      Setting::LogLevel(&c->log_level),
      Setting::Text("tls-cert", "FILE", "certificate chain of the client API (PEM); none: plaintext", &c->tls_cert),
      Setting::Text("tls-key", "FILE", "its private key (PEM)", &c->tls_key),
      Setting::Text("tls-client-ca", "FILE", "clients must show a certificate signed by one of these (PEM)",
                    &c->tls_client_ca),
      Setting::Text("worker-tls-ca", "FILE", "workers' certificates are signed by one of these (PEM); none: plaintext",
                    &c->worker_tls_ca),
      Setting::Text("worker-tls-cert", "FILE", "certificate shown to workers (PEM)", &c->worker_tls_cert),
      Setting::Text("worker-tls-key", "FILE", "its private key (PEM)", &c->worker_tls_key),
  };
}

// Rules between settings.
void CheckTogether(const RouterConfig& c, std::vector<std::string>* problems) {
  if (c.model_dir.empty()) {
    problems->push_back("model is not set, must be a model directory");
  } else {
    for (const char* file : {"config.json", "tokenizer.json"}) {
      std::error_code ignored;
      if (!std::filesystem::exists(std::filesystem::path(c.model_dir) / file, ignored)) {
        problems->push_back(absl::StrCat("model is '", c.model_dir, "', has no ", file));
      }
    }
  }
  if (c.replicas.empty()) problems->push_back("replica is not set, must name the workers of at least one replica");
  std::set<std::string> seen;
  for (const auto& replica : c.replicas) {
    for (const std::string& address : replica) {
      if (!seen.insert(address).second) problems->push_back(absl::StrCat("replica names ", address, " twice"));
    }
  }
  for (const auto& replica : c.replicas) {
    if (replica.size() != c.replicas[0].size()) {
      problems->push_back(absl::StrCat("replica '", absl::StrJoin(replica, ","), "' has ", replica.size(),
                                       " workers, must have as many as the first (", c.replicas[0].size(),
                                       "): a request continues on another replica only with the same arithmetic"));
    }
  }
  if (c.max_step_tokens < c.max_sequences) {
    problems->push_back(absl::StrCat("max-step-tokens is ", c.max_step_tokens, ", must be at least max-sequences (",
                                     c.max_sequences, "): every running sequence decodes one token per step"));
  }
  if (c.tls_cert.empty() != c.tls_key.empty()) problems->push_back("tls-cert and tls-key must be set together");
  if (!c.tls_client_ca.empty() && c.tls_cert.empty()) problems->push_back("tls-client-ca needs tls-cert and tls-key");
  if (c.worker_tls_cert.empty() != c.worker_tls_key.empty()) {
    problems->push_back("worker-tls-cert and worker-tls-key must be set together");
  }
  if (c.worker_tls_ca.empty() && !c.worker_tls_cert.empty()) {
    problems->push_back("worker-tls-cert and worker-tls-key need worker-tls-ca");
  }
}

}  // namespace

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments) {
  CommandLine line;
  RouterConfig* const config = &line.config;
  NIBBLE_ASSIGN_OR_RETURN(
      line.text,
      ParseSettings({.name = "nibble-router", .description = "the gRPC front of a Nibble cluster"}, Settings(config),
                    arguments, [config](std::vector<std::string>* problems) { CheckTogether(*config, problems); }));
  return line;
}

}  // namespace nibble
