// What executes plans on one rank. The gRPC service and nibble-eval both drive this page; it knows token ids, pages and
// slots, never text, never policy.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "kernels/ops.h"
#include "nibble/v1/worker.pb.h"
#include "worker/comm/communicator.h"

namespace nibble {

struct EngineLimits {
  int64_t kv_memory_bytes = 0;  // budget of this rank's page pool
  int64_t max_sequences = 0;    // slots
  int64_t max_step_tokens = 0;  // rows of one plan
};

class Engine {
 public:
  virtual ~Engine() = default;

  virtual int64_t num_pages() const = 0;
  virtual int64_t kv_page_bytes() const = 0;  // of this rank, all layers

  // Drops every sequence: all slots free, all pages free.
  virtual void Reset() = 0;

  // Executes one plan. Plans come from the network: one that breaks a rule of worker.proto (unknown slot, page id out
  // of range, more rows than max_step_tokens, a token id outside the vocabulary, ...) is INVALID_ARGUMENT with field,
  // value and limit, and the engine must be Reset. UNAVAILABLE / DEADLINE_EXCEEDED / CANCELLED come from collectives.
  virtual absl::Status Execute(const v1::StepPlan& plan, v1::StepResult* result) = 0;
};

// A rank's weights and arithmetic, before it has joined a group (worker/model/weights.h). Loading is slow and depends
// on rank and size only, so a service keeps the model over several groups. At most one engine at a time runs on a
// model.
class Model;

// INVALID_ARGUMENT when the model cannot be cut into world_size shards, or what Checkpoint reports for a bad tensor.
absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const Checkpoint& checkpoint, std::shared_ptr<Ops> ops, int rank,
                                                       int world_size);

// Allocates the page pool and everything a step needs; Execute allocates no device memory afterwards. The communicator
// is shared so that another thread can Abort it while Execute waits inside a collective; its rank and size must be the
// model's. INVALID_ARGUMENT for a limit out of range, RESOURCE_EXHAUSTED when the budget holds no page or memory lacks.
absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<const Model> model,
                                                     std::shared_ptr<Communicator> communicator,
                                                     const EngineLimits& limits);

}  // namespace nibble
