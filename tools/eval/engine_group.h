// The ranks of one replica as threads of this process: the worker's engine without gRPC around it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "kernels/ops.h"
#include "nibble/v1/worker.pb.h"
#include "worker/comm/communicator.h"
#include "worker/model/engine.h"

namespace nibble {

struct EngineGroupOptions {
  int world_size = 1;  // tensor-parallel size
  std::string backend = "cpu";  // of every rank; "cuda" has one rank
  int device = 0;               // CUDA device ordinal
  int threads_per_rank = 1;
  EngineLimits limits;  // of each rank
  std::chrono::milliseconds collective_timeout{60000};
  // May put something between the engine and its backend (ForwardingOps); null: nothing.
  std::function<std::unique_ptr<Ops>(int rank, std::unique_ptr<Ops> backend)> wrap_ops;
};

class EngineGroup {
 public:
  // Loads every rank's shard and joins them. The first error of any rank.
  static absl::StatusOr<std::unique_ptr<EngineGroup>> Create(const Checkpoint& checkpoint,
                                                             const EngineGroupOptions& options);

  int world_size() const { return static_cast<int>(ranks_.size()); }
  int64_t num_pages() const;  // the smallest of the ranks
  Engine& engine(int rank) { return *ranks_[static_cast<size_t>(rank)].engine; }
  Communicator& communicator(int rank) { return *ranks_[static_cast<size_t>(rank)].communicator; }
  std::string Describe() const { return ranks_.front().ops->Describe(); }

  void Reset();
  // Executes the plan on every rank; rank 0's result. An error of one rank aborts the others.
  absl::StatusOr<v1::StepResult> Execute(const v1::StepPlan& plan);

 private:
  struct Rank {
    std::shared_ptr<Ops> ops;
    std::shared_ptr<const Model> model;
    std::shared_ptr<Communicator> communicator;
    std::unique_ptr<Engine> engine;  // last: goes first
  };
  explicit EngineGroup(int world_size) : ranks_(static_cast<size_t>(world_size)) {}
  // Runs f(rank) for every rank at once, rank 0 in the calling thread; the first error that is not its consequence.
  absl::Status OnEveryRank(const std::function<absl::Status(int rank)>& f);

  std::vector<Rank> ranks_;
};

}  // namespace nibble
