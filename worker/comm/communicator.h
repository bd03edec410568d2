// How the ranks of one replica exchange activations. Results are the same bits on every rank.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // rows = Σ_r rows_r: added in f32 in rank order, one rounding to rows.dtype. UNAVAILABLE when a peer is gone,
  // DEADLINE_EXCEEDED when one hangs, CANCELLED after Abort; the communicator is unusable after any error.
  virtual absl::Status AllReduceSum(const Rows& rows) = 0;
  // in = [rows, row_bytes] of every rank; out = [rows, size · row_bytes]: each rank's columns, in rank order. Errors as
  // above.
  virtual absl::Status AllGather(const void* in, int64_t rows, size_t row_bytes, void* out) = 0;
  // Makes blocked and later collectives fail now. From any thread, more than once.
  virtual void Abort(std::string_view reason) = 0;
};

// Rendezvous in two steps, because only the router knows all ranks: every rank publishes an endpoint, then connects
// with everybody's.
class PendingCommunicator {
 public:
  virtual ~PendingCommunicator() = default;
  virtual std::string endpoint() const = 0;  // opaque bytes for the other ranks
  // Collective. endpoints in rank order, own one included. Consumes this.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::span<const std::string> endpoints) = 0;
};

inline constexpr int kMaxRanks = 64;
inline constexpr std::chrono::milliseconds kMaxCollectiveTimeout = std::chrono::minutes(10);

struct CommunicatorOptions {
  int rank = 0;
  int size = 1;
  std::string host = "127.0.0.1";           // address other ranks reach this one at
  std::chrono::milliseconds timeout{5000};  // of one collective, and of Connect
};

// INVALID_ARGUMENT for an option out of range, UNAVAILABLE when host is no address of this machine.
// size 1: solo. Otherwise Gloo over TCP (NCCL when the backend is CUDA).
absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(const CommunicatorOptions& options);

}  // namespace nibble
