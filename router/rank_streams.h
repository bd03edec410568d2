// The Execute streams of a replica's ranks as one: a plan goes to all of them, and a step is done when all have answered,
// so that a rank that hangs or disagrees is found at once and not some steps later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "common/base/bounded_queue.h"
#include "router/replica_metrics.h"
#include "router/worker_group.h"
#include "router/worker_stream.h"

namespace nibble {

// What the streams report, on gRPC threads. May not block.
struct RankStreamsEvents {
  // Steps in order. Tokens are rank 0's; the time of the forward pass is the slowest rank's.
  std::function<void(v1::StepResult result, uint32_t slowest_forward_us)> on_step;
  // A stream ended (OK: Close tells why), or a worker broke the protocol.
  std::function<void(uint32_t rank, absl::Status why)> on_broken;
};

class RankStreams : private WorkerStreamObserver {
 public:
  // Opens a stream to every worker of the group. `metrics` outlives the streams.
  RankStreams(const WorkerGroup& group, uint32_t max_steps_in_flight, RankStreamsEvents events,
              ReplicaMetrics* metrics);
  ~RankStreams() override;  // Close

  // Leaves the plan to a thread that serializes it once and writes it to every rank: a write costs its thread a system
  // call and gRPC's framing, which is too much times the ranks for the thread that makes the plans.
  void Send(v1::StepPlan plan);

  // Ends all streams; nothing is reported afterwards. How each ended, rank order.
  std::vector<absl::Status> Close();

  // The lowest rank that has not answered the oldest unfinished step.
  uint32_t MissingRank();

 private:
  void OnResult(uint32_t rank, v1::StepResult result) override;
  void OnBroken(uint32_t rank, absl::Status why) override { events_.on_broken(rank, std::move(why)); }
  void SendPlans();

  const RankStreamsEvents events_;
  ReplicaMetrics* const metrics_;

  std::mutex mutex_;                   // below
  std::vector<uint64_t> answered_;     // steps per rank
  uint64_t completed_ = 0;             // steps all ranks answered
  std::deque<v1::StepResult> results_; // rank 0's, not completed
  std::deque<uint32_t> forward_us_;    // slowest rank's, not completed

  BoundedQueue<v1::StepPlan> plans_;
  std::vector<std::unique_ptr<WorkerStream>> streams_;  // their callbacks use what is above
  std::thread sender_;
};

}  // namespace nibble
