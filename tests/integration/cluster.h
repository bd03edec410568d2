// A whole system on loopback: one nibble-router, replicas × tensor-parallel nibble-workers, and a client.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nibble/v1/inference.grpc.pb.h"
#include "tests/integration/process.h"

namespace nibble::testing {

// Sanitized builds are about ten times slower: they get less work and more time.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif
inline constexpr int kSlowdown = kSanitized ? 10 : 1;

// The bundled model quantized once per build folder: $NIBBLE_BIN_DIR/../test-models/MODE.
std::string TestModel(const std::string& mode);

struct ClusterOptions {
  std::string model;                        // default: TestModel("w4a4kv4")
  int replicas = 1;
  int tensor_parallel = 2;
  std::string backend = "cpu";
  std::string kv_memory = "48MiB";          // per worker
  std::vector<std::string> router_flags;
  std::vector<std::string> worker_flags;
  bool wait_ready = true;
};

class Cluster {
 public:
  explicit Cluster(ClusterOptions options);

  const std::string& address() const { return address_; }
  Process& router() { return *router_; }
  Process& worker(int replica, int rank) { return *workers_[static_cast<size_t>(replica * options_.tensor_parallel + rank)]; }
  // Starts the worker again on the port it had.
  void RestartWorker(int replica, int rank);

  v1::Inference::Stub& stub() { return *stub_; }
  // Blocks until GetStatus shows `ready` ready replicas; false when the time is over.
  bool WaitReady(int ready, std::chrono::milliseconds timeout);
  v1::GetStatusResponse Status();
  // Polls GetStatus until the predicate holds.
  bool WaitStatus(const std::function<bool(const v1::GetStatusResponse&)>& predicate, std::chrono::milliseconds timeout);
  std::string Metrics();                    // the router's /metrics page

 private:
  void StartWorker(int index, const std::string& listen);
  ClusterOptions options_;
  std::string dir_;
  std::vector<std::unique_ptr<Process>> workers_;
  std::vector<std::string> worker_addresses_;
  std::unique_ptr<Process> router_;
  std::string address_;
  std::string metrics_address_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

// What came back for one request; sequences by index.
struct Generation {
  grpc::Status status;
  struct Sequence {
    std::vector<uint32_t> ids;
    std::vector<float> logprobs;
    std::string text;
    v1::Finish finish;
    bool finished = false;
  };
  std::vector<Sequence> sequences;
  std::vector<v1::TokenLogprobs> prompt_logprobs;
  const std::vector<uint32_t>& ids() const { return sequences.at(0).ids; }
};
Generation Generate(v1::Inference::Stub& stub, const v1::GenerateRequest& request,
                    std::chrono::milliseconds deadline = std::chrono::minutes(5));

// Runs requests with `concurrency` blocking clients; results in request order.
std::vector<Generation> GenerateAll(Cluster& cluster, const std::vector<v1::GenerateRequest>& requests,
                                    int concurrency);

// `count` varied requests over the held-out text: lengths 1..max_prompt tokens, shared prefixes, greedy and seeded
// sampling with every parameter in use, stop ids and strings. Deterministic in `seed`.
std::vector<v1::GenerateRequest> VariedRequests(Cluster& cluster, int count, int max_prompt, int max_output,
                                                uint64_t seed);

}  // namespace nibble::testing
