// One replica: its workers, its scheduler, and the one thread that owns both.
//
// The thread's life: form the group, serve, fail, hand the unfinished sequences back, form again. Serving is a loop of
// three calls: Schedule, Send, Commit; with nothing to do it sleeps on its inbox. Other threads put messages there.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "router/inbox.h"
#include "router/placement.h"
#include "router/rank_streams.h"
#include "router/replica_metrics.h"
#include "router/scheduler.h"
#include "router/sequence.h"
#include "router/worker_group.h"

namespace nibble {

struct ReplicaOptions {
  uint32_t index = 0;
  // num_pages and page_tokens come from the workers.
  SchedulerConfig scheduler;
  size_t inbox_messages = 1 << 16;
  std::chrono::milliseconds info_timeout{2000};
  std::chrono::milliseconds load_timeout{1800000};
  std::chrono::milliseconds join_timeout{60000};
  std::chrono::milliseconds step_timeout{5000};    // after the result of a step was due; of a ping likewise
  std::chrono::milliseconds ping_interval{1000};
  std::chrono::milliseconds abort_timeout{1000};
  std::chrono::milliseconds min_backoff{100};
  std::chrono::milliseconds max_backoff{1000};
};

enum class ReplicaState : uint8_t { kConnecting, kLoading, kReady, kDown };
const char* ReplicaStateName(ReplicaState state);  // "connecting", ...

// For people: GetStatus.
struct ReplicaReport {
  uint32_t index = 0;
  ReplicaState state = ReplicaState::kConnecting;
  bool ready = false;             // takes new sequences: kReady and no worker is draining
  std::string last_error;         // of the last failure; stays for people after recovery
  std::vector<std::string> workers;
  SchedulerStats stats;
  double generation_tokens_per_second = 0;
};

// What a replica tells its fleet, always on the replica's thread.
class ReplicaObserver {
 public:
  virtual ~ReplicaObserver() = default;
  virtual void OnReadyChanged(uint32_t replica, bool ready) = 0;
  // Unfinished sequences of a replica that went down, in order of arrival.
  virtual void OnSequencesLost(uint32_t replica, std::vector<std::unique_ptr<Sequence>> lost,
                               const absl::Status& why) = 0;
  // The events of a step. *events is the callee's to empty.
  virtual void OnEvents(std::vector<SequenceEvent>* events) = 0;
};

class Replica {
 public:
  // `agreement`, `observer` and `metrics` outlive the replica.
  Replica(const ReplicaOptions& options, std::vector<std::string> addresses,
          const std::vector<std::shared_ptr<grpc::Channel>>& channels, ModelAgreement* agreement,
          ReplicaObserver* observer, ReplicaMetrics* metrics);
  ~Replica();  // Stop

  void Start();
  // Leaves at once: running sequences are handed to OnSequencesLost. Blocks until the thread has ended.
  void Stop();

  // From any thread. False: not ready or full, and the sequence is still the caller's.
  bool Add(std::unique_ptr<Sequence>* sequence);
  // Takes effect before the next plan. Unknown ids are ignored.
  void Cancel(uint64_t sequence_id);

  ReplicaReport report() const;
  // What placement looks at; sequences in the inbox count as waiting. cached_prefix_tokens is the caller's to fill in.
  ReplicaSnapshot snapshot() const;
  // For admission: sequences beyond the slots, whether the scheduler has seen them or not, and all prompt tokens that wait.
  struct Queue {
    uint32_t sequences = 0;
    uint64_t prompt_tokens = 0;
  };
  Queue queue() const;

 private:
  struct AddMessage {
    std::unique_ptr<Sequence> sequence;
  };
  struct CancelMessage {
    uint64_t sequence_id;
  };
  struct StepDone {  // as RankStreamsEvents::on_step
    uint64_t epoch;
    v1::StepResult result;
    uint32_t slowest_forward_us;
  };
  struct Broken {  // as RankStreamsEvents::on_broken
    uint64_t epoch;
    uint32_t rank;
    absl::Status why;
  };
  struct Pong {
    uint64_t epoch;
    uint32_t rank;
    absl::Status status;
    uint64_t instance;
    bool draining;
  };
  struct Wake {};
  using Message = std::variant<AddMessage, CancelMessage, StepDone, Broken, Pong, Wake>;
  struct Incarnation;

  void Run();
  // One life of the group, from the first call to the failure that ends it. *served: it was ready in between.
  absl::Status FormAndServe(bool* served);
  absl::Status Serve(Incarnation* life);
  absl::Status Handle(Message* message, Incarnation* life);
  void SendPlans(Incarnation* life);
  void DeliverEvents(Incarnation* life);
  void SendPings(Incarnation* life);
  // Closes the streams; returns `why`, or what the workers said about it.
  absl::Status TakeDown(Incarnation* life, absl::Status why);
  void SetState(ReplicaState state, bool ready);
  void SetError(const absl::Status& error);
  void Publish(const SchedulerStats& stats, TimePoint now);
  bool SleepUnlessStopped(std::chrono::milliseconds duration);

  const ReplicaOptions options_;
  WorkerGroup group_;
  ModelAgreement* const agreement_;
  ReplicaObserver* const observer_;
  ReplicaMetrics* const metrics_;
  // Shared with calls in flight, which may answer after this object is gone.
  const std::shared_ptr<Inbox<Message>> inbox_;

  // The replica's thread only.
  uint64_t epoch_ = 0;
  std::vector<Message> messages_;
  std::vector<SequenceEvent> events_;
  uint32_t handled_adds_ = 0;         // since the last Publish
  uint64_t handled_tokens_ = 0;
  uint64_t steps_before_ = 0;         // of earlier incarnations
  std::string logged_error_;

  std::atomic<bool> stopping_ = false;
  std::atomic<bool> serving_ = false;  // somebody empties the inbox
  mutable std::mutex mutex_;          // below
  std::condition_variable stop_changed_;
  ReplicaReport report_;
  uint32_t inbox_adds_ = 0;           // sequences put and not yet in report_.stats
  uint64_t inbox_tokens_ = 0;
  TimePoint rate_since_{};
  uint64_t rate_tokens_ = 0;
  TimePoint published_at_{};
  std::thread thread_;
};

}  // namespace nibble
