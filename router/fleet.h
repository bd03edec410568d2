// All replicas of the router: who takes a request, what happens to it when its replica is lost.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/metrics/registry.h"
#include "router/output_pool.h"
#include "router/prefix_index.h"
#include "router/replay.h"
#include "router/replica.h"
#include "router/replica_metrics.h"
#include "router/sequence.h"

namespace nibble {

struct FleetOptions {
  std::string model_name;
  ReplicaOptions replica;                   // of each; index is filled in
  uint32_t max_waiting_requests = 1024;     // sequences, over all replicas
  uint64_t max_waiting_tokens = 4u << 20;   // of their prompts
  std::chrono::milliseconds replay_wait{0};
  // A sequence whose replica went down this often is suspected of being the reason, and fails.
  uint32_t max_replays = 3;
};

class Fleet : private ReplicaObserver {
 public:
  struct Workers {
    std::vector<std::string> addresses;     // rank order
    std::vector<std::shared_ptr<grpc::Channel>> channels;
  };
  // `output` and `metrics` outlive the fleet. `on_ready` hears, on some thread, whether at least one replica is ready.
  Fleet(const FleetOptions& options, std::vector<Workers> replicas, ExpectedModel expected, OutputPool* output,
        MetricRegistry* metrics, std::function<void(bool ready)> on_ready);
  ~Fleet() override;  // Stop

  void Start();
  // Unfinished sequences end with UNAVAILABLE.
  void Stop();

  // Takes the sequences of one request to one replica. RESOURCE_EXHAUSTED when too much waits, UNAVAILABLE when no
  // replica is ready and replay_wait is 0; both say when to retry. Later failures go to the sequences' output. Any thread.
  absl::Status Submit(std::vector<std::unique_ptr<Sequence>> sequences);
  // From any thread; takes effect before the next plan of the replica that has it.
  void Cancel(uint64_t sequence_id);

  bool ready() const { return num_ready_ > 0; }
  std::vector<ReplicaReport> Reports() const;

 private:
  using Sequences = std::vector<std::unique_ptr<Sequence>>;

  void OnReadyChanged(uint32_t replica, bool ready) override;
  void OnSequencesLost(uint32_t replica, Sequences lost, const absl::Status& why) override;
  void OnEvents(std::vector<SequenceEvent>* events) override;

  absl::Status CheckQueues(size_t sequences, uint64_t tokens);  // under submit_mutex_
  // Puts the sequences of one request into the inbox of the replica that placement picks; while one refuses (it went
  // down just now), of the next. *sequences keeps what nobody took.
  void Place(Sequences* sequences);
  void Replay(std::unique_ptr<Sequence> sequence, TimePoint until);
  absl::Status NoReplica() const;
  absl::Status WithoutReplica(const Sequence& sequence) const;  // what became of it

  const FleetOptions options_;
  ModelAgreement agreement_;
  OutputPool* const output_;
  const std::function<void(bool)> on_ready_;
  std::vector<std::unique_ptr<ReplicaMetrics>> metrics_;
  std::vector<std::unique_ptr<Replica>> replicas_;

  std::atomic<bool> stopping_ = false;
  std::atomic<uint64_t> arrivals_ = 0;
  std::atomic<int> num_ready_ = 0;
  std::mutex ready_mutex_;                  // orders calls of on_ready_
  std::mutex submit_mutex_;                 // of two requests, the second counts the first
  PrefixIndex prefixes_;
  ReplayQueue replay_;
};

}  // namespace nibble
