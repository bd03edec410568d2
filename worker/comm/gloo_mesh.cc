#include "worker/comm/gloo_mesh.h"

#include <gloo/transport/buffer.h>
#include <gloo/transport/context.h>
#include <gloo/transport/pair.h>
#include <sys/socket.h>

#include <csignal>
#include <cstring>
#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/comm/gloo_pair.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

// In front of every payload, padded to a cache line.
struct MessageHeader {
  uint64_t round = 0;
  uint64_t bytes = 0;
  uint8_t padding[48] = {};
};
static_assert(sizeof(MessageHeader) == 64);

// Two messages per direction: a peer sends message n + 1 only when it has read message n, hence when message n - 1 of
// this rank, whose place n + 1 takes, has been read too.
constexpr size_t kPlaces = 2;
constexpr size_t kPlaceBytes = sizeof(MessageHeader) + GlooMesh::kChunkBytes;

// Gloo writes with writev, which has no MSG_NOSIGNAL: a peer's death must be an error and not the end of this process.
void IgnoreSigpipe() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction current = {};
    if (sigaction(SIGPIPE, nullptr, &current) == 0 && current.sa_handler == SIG_DFL) std::signal(SIGPIPE, SIG_IGN);
  });
}

}  // namespace

struct GlooMesh::Peer {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> send_memory{kPlaces * kPlaceBytes / sizeof(Line)};
  std::vector<Line> receive_memory{kPlaces * kPlaceBytes / sizeof(Line)};
  std::string name;  // "rank 1 at 127.0.0.1:4711", for messages
  std::unique_ptr<::gloo::transport::Buffer> send;
  std::unique_ptr<::gloo::transport::Buffer> receive;

  uint8_t* send_place(uint64_t round) { return send_memory.front().bytes + (round % kPlaces) * kPlaceBytes; }
  const uint8_t* receive_place(uint64_t round) const {
    return receive_memory.front().bytes + (round % kPlaces) * kPlaceBytes;
  }
};

GlooMesh::GlooMesh(int rank, int size, std::chrono::milliseconds timeout, Rendezvous rendezvous)
    : rank_(rank), size_(size), timeout_(timeout), rendezvous_(std::move(rendezvous)), peers_(size) {}

GlooMesh::~GlooMesh() = default;

absl::StatusOr<std::unique_ptr<GlooMesh>> GlooMesh::Open(int rank, int size, const std::string& host,
                                                         std::chrono::milliseconds timeout) {
  IgnoreSigpipe();
  NIBBLE_ASSIGN_OR_RETURN(Rendezvous rendezvous, Rendezvous::Open(rank, size, kChunkBytes, host));
  return std::unique_ptr<GlooMesh>(new GlooMesh(rank, size, timeout, std::move(rendezvous)));
}

absl::Status GlooMesh::Connect(std::span<const std::string> endpoints) {
  NIBBLE_ASSIGN_OR_RETURN(connections_, rendezvous_.Meet(endpoints, timeout_));
  try {
    context_ = MakeUnreachableDevice()->createContext(rank_, size_);
    context_->setTimeout(timeout_);
    for (int p = 0; p < size_; ++p) {
      if (p == rank_) continue;
      auto& pair = context_->createPair(p);
      pair->setLocalRank(0);
      Adopt(connections_[p].get(), timeout_, pair.get());
      auto peer = std::make_unique<Peer>();
      peer->name = rendezvous_.NameOf(p);
      // Destroying a Gloo buffer unregisters its slot, whoever holds it: each direction has its own.
      peer->receive = pair->createRecvBuffer(p < rank_ ? 0 : 1, peer->receive_memory.data(), kPlaces * kPlaceBytes);
      peer->send = pair->createSendBuffer(p < rank_ ? 1 : 0, peer->send_memory.data(), kPlaces * kPlaceBytes);
      peers_[p] = std::move(peer);
    }
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("Gloo cannot take over the connections: ", e.what()));
  }
  return absl::OkStatus();
}

absl::Status GlooMesh::Round(std::span<const Message> send, std::span<const size_t> expected_bytes) {
  NIBBLE_CHECK_EQ(send.size(), peers_.size());
  NIBBLE_CHECK_EQ(expected_bytes.size(), peers_.size());
  NIBBLE_RETURN_IF_ERROR(status());
  ++round_;
  const Clock::time_point start = Clock::now();
  int p = 0;
  try {
    for (p = 0; p < size_; ++p) {
      if (p == rank_) continue;
      NIBBLE_CHECK_LE(send[p].bytes, kChunkBytes);
      uint8_t* place = peers_[p]->send_place(round_);
      const MessageHeader header{.round = round_, .bytes = send[p].bytes};
      std::memcpy(place, &header, sizeof(header));
      if (send[p].bytes > 0) std::memcpy(place + sizeof(header), send[p].data, send[p].bytes);
      const size_t offset = (round_ % kPlaces) * kPlaceBytes;
      peers_[p]->send->send(offset, sizeof(header) + send[p].bytes, offset);
    }
    for (p = 0; p < size_; ++p) {
      if (p == rank_) continue;
      peers_[p]->receive->waitRecv();
      MessageHeader header;
      std::memcpy(&header, peers_[p]->receive_place(round_), sizeof(header));
      if (header.round != round_ || header.bytes != expected_bytes[p]) {
        return Fail(absl::InternalError(absl::StrCat(peers_[p]->name, " sent ", header.bytes, " bytes in round ",
                                                     header.round, ", expected ", expected_bytes[p], " bytes in round ",
                                                     round_, ": the ranks' plans differ")));
      }
    }
    for (p = 0; p < size_; ++p) {
      if (p != rank_) peers_[p]->send->waitSend();
    }
  } catch (const std::exception& e) {
    return Fail(peers_[p]->name, e.what(), start);
  }
  return absl::OkStatus();
}

const uint8_t* GlooMesh::received(int peer) const {
  return peers_[peer]->receive_place(round_) + sizeof(MessageHeader);
}

void GlooMesh::Abort(std::string_view reason) {
  Fail(absl::CancelledError(absl::StrCat("communicator aborted: ", std::string(reason)))).IgnoreError();
}

absl::Status GlooMesh::Fail(const std::string& peer, const std::string& what, Clock::time_point start) {
  // Gloo has one exception class for everything; time tells a hanging peer from a gone one.
  const bool timed_out = Clock::now() - start >= timeout_ * 9 / 10;  // the kernel's timers are coarse
  return Fail(timed_out ? absl::DeadlineExceededError(
                              absl::StrCat(peer, " did not answer within ", timeout_.count(), " ms: ", what))
                        : absl::UnavailableError(absl::StrCat(peer, ": ", what)));
}

absl::Status GlooMesh::Fail(absl::Status status) {
  absl::Status first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = std::move(status);
    first = status_;
  }
  // Whoever waits for a message, here or at the other end, reads the end of the stream.
  for (const Descriptor& connection : connections_) shutdown(connection.get(), SHUT_RDWR);
  return first;
}

absl::Status GlooMesh::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

}  // namespace nibble
