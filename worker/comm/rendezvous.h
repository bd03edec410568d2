// How the ranks of a group find each other over TCP. Everything here expects strangers: whoever can reach the port may
// connect, send anything, and be slow about it. A connection is a rank's only after it has shown the secret that this
// rank published through the router, and it is handed on only then.
//
// The rank with the larger number calls. It shows the secret of the rank it called, and is shown its own: whoever has
// taken over the port of a rank that died cannot answer. Secrets cross the wire in clear: they keep strangers out, not
// somebody who reads the traffic.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "worker/comm/descriptor.h"
#include "worker/comm/rank_endpoint.h"

namespace nibble {

class Rendezvous {
 public:
  // Connections by strangers that are heard at the same time; one more drops the oldest. A rank's greeting follows its
  // connection at once, so only a flood can push it out, and then it calls again.
  static constexpr size_t kMaxStrangers = 64;

  // Listens on any port of host. UNAVAILABLE when host is no address of this machine.
  static absl::StatusOr<Rendezvous> Open(int rank, int size, uint32_t chunk_bytes, const std::string& host);

  std::string endpoint() const { return EncodeEndpoint(own_); }

  // Collective, once; stops listening, whatever comes of it. A connected socket to every other rank, in rank order (own
  // place: none). INVALID_ARGUMENT for endpoints no rank of this group can have published, UNAVAILABLE when a rank is
  // gone or was given other endpoints, DEADLINE_EXCEEDED when one does not come.
  absl::StatusOr<std::vector<Descriptor>> Meet(std::span<const std::string> endpoints,
                                               std::chrono::milliseconds timeout);

  // "rank 1 at 127.0.0.1:4711", for messages. After Meet.
  std::string NameOf(int rank) const { return absl::StrCat("rank ", rank, " at ", ranks_[rank].AddressText()); }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kGreetingBytes = 56;
  struct Stranger;

  Rendezvous(const RankEndpoint& own, Descriptor listener) : own_(own), listener_(std::move(listener)) {}

  absl::Status ParseAll(std::span<const std::string> endpoints);
  std::string Greeting(uint32_t from, uint32_t to) const;
  absl::StatusOr<Descriptor> Call(const RankEndpoint& peer, Clock::time_point deadline);
  absl::StatusOr<Descriptor> CallOnce(const RankEndpoint& peer, Clock::time_point deadline);
  absl::Status ReceiveCalls(Clock::time_point deadline, std::vector<Descriptor>* ranks);
  absl::Status Accept(std::vector<Stranger>* strangers);
  absl::Status Judge(Stranger stranger, std::vector<Descriptor>* ranks);

  RankEndpoint own_;
  Descriptor listener_;
  std::vector<RankEndpoint> ranks_;  // as Meet was given them
  uint64_t hash_ = 0;                // of them: the ranks must have been given the same
  std::chrono::milliseconds timeout_{0};
  uint64_t num_refused_ = 0;  // strangers, for the message
};

}  // namespace nibble
