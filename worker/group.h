// One rank's membership in one epoch of one replica: load the shard, meet the other ranks, execute plans. A group lives
// once and goes one way: loading → prepared → joining → serving → ended. One thread does all its work; other threads
// leave messages.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nibble/v1/worker.pb.h"
#include "worker/backend.h"
#include "worker/worker_metrics.h"

namespace nibble {

// Where the results of one Execute stream go. The gRPC stream is one; tests have their own. Called from any thread,
// never under a lock of the group.
class ResultSink {
 public:
  virtual ~ResultSink() = default;
  // False when nobody listens any more.
  virtual bool Write(v1::StepResult result) = 0;
  // Ends the stream after the results written so far. The first call decides; later ones have no effect.
  virtual void Finish(const absl::Status& status) = 0;
};

// Page pools are large: the engine of a new group is made only when the engine of the old one is gone.
class EngineSlot {
 public:
  // Waits until the slot is free and takes it; false when `give_up` became true first (call Poke after changing it).
  bool Acquire(const std::function<bool()>& give_up);
  void Release();
  void Poke();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool taken_ = false;
};

struct GroupOptions {
  uint64_t epoch = 0;
  int rank = 0;
  int world_size = 1;
  int64_t kv_memory_bytes = 0;
};

class Group {
 public:
  // A router that runs one or two plans ahead never meets this bound.
  static constexpr size_t kMaxQueuedPlans = 16;

  using PrepareDone = std::function<void(absl::StatusOr<v1::PrepareResponse>)>;
  using JoinDone = std::function<void(absl::StatusOr<v1::JoinResponse>)>;

  // Starts to load. `done` is called exactly once, from any thread. backend, slot and metrics outlive the group.
  Group(const GroupOptions& options, Backend* backend, EngineSlot* slot, WorkerMetrics* metrics, PrepareDone done);
  // Abort, then waits for the thread: at once when ended(), else as long as a load or a rendezvous still takes.
  ~Group();

  uint64_t epoch() const { return options_.epoch; }

  // `done` is called exactly once. FAILED_PRECONDITION before Prepare is done or when joined before.
  void Join(v1::JoinRequest request, JoinDone done);

  // The stream's results go to `sink`. The newest stream wins: an older one is finished with ABORTED, and its queued
  // plans are dropped. FAILED_PRECONDITION unless the group is serving.
  absl::Status OpenStream(std::shared_ptr<ResultSink> sink);
  // The next plan of the stream; dropped when the stream is not the current one any more (whoever took it away ends it
  // and says why). RESOURCE_EXHAUSTED when kMaxQueuedPlans wait.
  absl::Status Submit(const ResultSink* sink, v1::StepPlan plan);
  // No more plans: executes what is queued, drops all sequences and finishes the stream with OK.
  void EndInput(const ResultSink* sink);
  // Nobody listens any more: drops what is queued and all sequences.
  void DropStream(const ResultSink* sink);

  // Ends the group: whatever waits (calls, stream, collectives) fails now with this status. The first call decides.
  void Abort(const absl::Status& status);

  // No plan is queued or running, and no sequence is known.
  bool idle() const;
  // The thread has done its work; destruction does not block.
  bool ended() const;

 private:
  enum class State { kLoading, kPrepared, kJoining, kServing };
  static const char* StateName(State state);

  void Run();
  absl::Status LoadShard();
  absl::Status ServeOneGroup();
  absl::Status Connect(const v1::JoinRequest& request);
  absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const v1::JoinRequest& request,
                                                     std::chrono::steady_clock::time_point start);
  std::shared_ptr<Communicator> communicator() const;
  absl::Status ExecutePlans(Engine& engine);
  absl::Status ExecutePlan(Engine& engine, const v1::StepPlan& plan, ResultSink& sink);
  void CountSequences(const v1::StepPlan& plan);
  bool aborted() const;

  const GroupOptions options_;
  Backend* const backend_;
  EngineSlot* const slot_;
  WorkerMetrics* const metrics_;

  // The thread's own.
  std::shared_ptr<Shard> shard_;
  std::unique_ptr<PendingCommunicator> rendezvous_;
  std::vector<bool> started_;  // [max_sequences]

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  State state_ = State::kLoading;
  bool ended_ = false;
  absl::Status failure_;      // not OK once aborted or failed
  PrepareDone prepare_done_;  // null once called
  JoinDone join_done_;
  v1::JoinRequest join_request_;
  std::shared_ptr<Communicator> communicator_;
  std::shared_ptr<ResultSink> stream_;  // the current one
  bool stream_changed_ = false;         // the engine still holds the sequences of another stream
  bool input_ended_ = false;
  bool executing_ = false;
  int64_t num_sequences_ = 0;
  std::deque<v1::StepPlan> plans_;  // of stream_

  std::thread thread_;  // last: started when the rest exists
};

}  // namespace nibble
