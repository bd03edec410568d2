// A full mesh of Gloo TCP pairs and one primitive over it: a round, in which every rank sends one message to every
// other rank. Gloo's own collectives cost a ring of rendezvous messages each; a round is one hop, one write and one
// read per peer, because the receive buffers are registered once and every message goes to a known place in them.
//
// Ranks meet through Rendezvous, which admits nobody else. Their traffic is neither encrypted nor signed: keep it on a
// private network. Gloo reports by exceptions; they end here.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/comm/descriptor.h"
#include "worker/comm/rendezvous.h"

namespace gloo::transport {
class Context;
}

namespace nibble {

class GlooMesh {
 public:
  // Payload of one message. Ranks write before they read, so a message must fit into the socket buffers between them;
  // part of the endpoint, because ranks must agree on it.
  static constexpr size_t kChunkBytes = 64 * 1024;

  struct Message {
    const void* data = nullptr;
    size_t bytes = 0;  // ≤ kChunkBytes
  };

  // Listens for the other ranks. UNAVAILABLE when host is no address of this machine.
  static absl::StatusOr<std::unique_ptr<GlooMesh>> Open(int rank, int size, const std::string& host,
                                                        std::chrono::milliseconds timeout);
  ~GlooMesh();
  GlooMesh(const GlooMesh&) = delete;
  GlooMesh& operator=(const GlooMesh&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  std::string endpoint() const { return rendezvous_.endpoint(); }

  // Collective, once. Errors as Rendezvous::Meet.
  absl::Status Connect(std::span<const std::string> endpoints);

  // Collective. send[p] goes to rank p (send[rank] is ignored) and expected_bytes[p] bytes arrive from it. INTERNAL
  // when a peer is in another round or sends another size: the ranks executed different plans.
  absl::Status Round(std::span<const Message> send, std::span<const size_t> expected_bytes);
  // What rank p sent in the last round, 64-byte aligned. Valid until the next round.
  const uint8_t* received(int peer) const;

  // From any thread, more than once.
  void Abort(std::string_view reason);

 private:
  struct Peer;

  GlooMesh(int rank, int size, std::chrono::milliseconds timeout, Rendezvous rendezvous);
  // Maps a Gloo failure of an operation begun at start to a status, remembers it, and shuts every connection down, so
  // that the other ranks learn of it at once and not by their own timeout.
  absl::Status Fail(const std::string& peer, const std::string& what, std::chrono::steady_clock::time_point start);
  absl::Status Fail(absl::Status status);
  absl::Status status() const;

  const int rank_;
  const int size_;
  const std::chrono::milliseconds timeout_;
  Rendezvous rendezvous_;
  uint64_t round_ = 0;
  // Gloo has duplicates of these. It cannot wake a thread that waits for a message; shutting the connection down can.
  std::vector<Descriptor> connections_;  // [size], none at rank
  std::shared_ptr<::gloo::transport::Context> context_;
  std::vector<std::unique_ptr<Peer>> peers_;  // [size], null at rank

  mutable std::mutex mutex_;
  absl::Status status_;  // guarded by mutex_; the first failure or Abort, sticky
};

}  // namespace nibble
