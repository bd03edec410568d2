// What the service needs to know about arithmetic: load a shard, meet the other ranks, make an engine. Two of them
// exist: the model (model_backend.h) and a mock that answers at once (mock_engine.h).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/comm/communicator.h"
#include "worker/model/engine.h"

namespace nibble {

// One rank's weights, loaded.
class Shard {
 public:
  virtual ~Shard() = default;
  // The communicator's rank and size are the shard's. Errors as nibble::CreateEngine.
  virtual absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<Communicator> communicator,
                                                               const EngineLimits& limits) = 0;
};

// Called by the threads of several groups, of which at most one has an engine.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;    // "cpu", "cuda" or "mock"
  virtual std::string device() const = 0;  // for people
  virtual v1::ModelInfo model() const = 0;

  // Slow. A shard that was loaded last is kept and returned at once.
  virtual absl::StatusOr<std::shared_ptr<Shard>> Load(int rank, int world_size) = 0;
  virtual absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(int rank, int world_size) = 0;
};

}  // namespace nibble
