#include "worker/comm/gloo_mesh.h"

#include <dirent.h>
#include <fcntl.h>
#include <gloo/transport/buffer.h>
#include <gloo/transport/context.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/address.h>
#include <gloo/transport/tcp/device.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/comm/gloo_endpoint.h"

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

// Calls `expired` once unless destroyed before the deadline.
class Watchdog {
 public:
  Watchdog(std::chrono::milliseconds timeout, std::function<void()> expired)
      : thread_([this, timeout, expired = std::move(expired)] {
          std::unique_lock<std::mutex> lock(mutex_);
          if (!stopped_.wait_for(lock, timeout, [this] { return stop_; })) {
            lock.unlock();
            expired();
          }
        }) {}
  ~Watchdog() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    stopped_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  std::thread thread_;  // last: started when the rest exists
};

// FNV-1a: the same on every machine, unlike absl::Hash.
uint64_t HashEndpoints(std::span<const std::string> endpoints) {
  uint64_t hash = 14695981039346656037ull;
  for (const std::string& endpoint : endpoints) {
    for (const char c : endpoint) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  }
  return hash;
}

bool SameAddress(const sockaddr_storage& a, const sockaddr_storage& b) {
  if (a.ss_family != b.ss_family) return false;
  if (a.ss_family == AF_INET) {
    const auto& x = reinterpret_cast<const sockaddr_in&>(a);
    const auto& y = reinterpret_cast<const sockaddr_in&>(b);
    return x.sin_port == y.sin_port && std::memcmp(&x.sin_addr, &y.sin_addr, sizeof(x.sin_addr)) == 0;
  }
  const auto& x = reinterpret_cast<const sockaddr_in6&>(a);
  const auto& y = reinterpret_cast<const sockaddr_in6&>(b);
  return x.sin6_port == y.sin6_port && std::memcmp(&x.sin6_addr, &y.sin6_addr, sizeof(x.sin6_addr)) == 0;
}

// Duplicates of this process's connected sockets whose own address is one of `addresses`.
std::vector<int> DuplicateConnectedSockets(std::span<const sockaddr_storage> addresses) {
  std::vector<int> sockets;
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return sockets;
  while (const dirent* entry = readdir(dir)) {
    const int fd = std::atoi(entry->d_name);  // "." and ".." read as 0, which is no socket of ours
    sockaddr_storage own = {}, other = {};
    socklen_t own_bytes = sizeof(own), other_bytes = sizeof(other);
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&own), &own_bytes) != 0) continue;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&other), &other_bytes) != 0) continue;
    if (std::any_of(addresses.begin(), addresses.end(), [&](const auto& a) { return SameAddress(a, own); }))
      sockets.push_back(fd);
  }
  closedir(dir);
  // Only now: the directory would list the duplicates as well.
  for (int& socket : sockets) socket = fcntl(socket, F_DUPFD_CLOEXEC, 0);
  std::erase(sockets, -1);
  return sockets;
}

// Gloo finds out too, but says less and leaks the addresses it looked up.
absl::Status CheckIsLocal(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found); error != 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on host ", host, ": ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  int error = 0;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const int fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
    const bool bound = fd >= 0 && bind(fd, at->ai_addr, at->ai_addrlen) == 0;
    error = errno;
    if (fd >= 0) close(fd);
    if (bound) return absl::OkStatus();
  }
  return absl::UnavailableError(absl::StrCat("cannot listen on host ", host, ": ", std::strerror(error)));
}

const ::gloo::transport::tcp::Address& AddressOf(const ::gloo::transport::Pair& pair) {
  return dynamic_cast<const ::gloo::transport::tcp::Address&>(pair.address());
}

}  // namespace

struct GlooMesh::Peer {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> send_memory{kPlaces * kPlaceBytes / sizeof(Line)};
  std::vector<Line> receive_memory{kPlaces * kPlaceBytes / sizeof(Line)};
  std::string name;  // "rank 1 at [127.0.0.1]:4711", for messages
  std::unique_ptr<::gloo::transport::Buffer> send;
  std::unique_ptr<::gloo::transport::Buffer> receive;

  uint8_t* send_place(uint64_t round) { return send_memory.front().bytes + (round % kPlaces) * kPlaceBytes; }
  const uint8_t* receive_place(uint64_t round) const {
    return receive_memory.front().bytes + (round % kPlaces) * kPlaceBytes;
  }
};

GlooMesh::GlooMesh(int rank, int size, std::chrono::milliseconds timeout)
    : rank_(rank), size_(size), timeout_(timeout), peers_(size) {}

absl::StatusOr<std::unique_ptr<GlooMesh>> GlooMesh::Open(int rank, int size, const std::string& host,
                                                         std::chrono::milliseconds timeout) {
  IgnoreSigpipe();
  NIBBLE_RETURN_IF_ERROR(CheckIsLocal(host));
  auto mesh = std::unique_ptr<GlooMesh>(new GlooMesh(rank, size, timeout));
  try {
    mesh->context_ =
        ::gloo::transport::tcp::CreateDevice(::gloo::transport::tcp::attr(host.c_str()))->createContext(rank, size);
    mesh->context_->setTimeout(timeout);
    for (int p = 0; p < size; ++p) {
      if (p == rank) continue;
      auto& pair = mesh->context_->createPair(p);
      pair->setLocalRank(0);
      auto peer = std::make_unique<Peer>();
      peer->name = absl::StrCat("rank ", p);
      // Destroying a Gloo buffer unregisters its slot, whoever holds it: each direction has its own.
      peer->receive = pair->createRecvBuffer(p < rank ? 0 : 1, peer->receive_memory.data(), kPlaces * kPlaceBytes);
      peer->send = pair->createSendBuffer(p < rank ? 1 : 0, peer->send_memory.data(), kPlaces * kPlaceBytes);
      mesh->peers_[p] = std::move(peer);
    }
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("cannot listen on host ", host, ": ", e.what()));
  }
  return mesh;
}

GlooMesh::~GlooMesh() {
  for (const int socket : sockets_) close(socket);
  ClosePairs();  // Gloo's thread must have let go of the pairs before the buffers it writes to are freed
  for (auto& peer : peers_) peer.reset();
}

void GlooMesh::ClosePairs() {
  for (int p = 0; p < size_; ++p) {
    if (peers_[p] == nullptr) continue;
    try {
      context_->getPair(p)->close();
    } catch (const std::exception&) {
      // Only epoll_ctl on Gloo's own descriptor could have failed; there is nothing left to close then.
    }
  }
}

std::string GlooMesh::endpoint() const {
  GlooEndpoint endpoint{.rank = static_cast<uint32_t>(rank_),
                        .size = static_cast<uint32_t>(size_),
                        .chunk_bytes = static_cast<uint32_t>(kChunkBytes),
                        .addresses = {}};
  for (int p = 0; p < size_; ++p) {
    if (p == rank_) continue;
    const auto& address = AddressOf(*context_->getPair(p));
    endpoint.addresses.push_back({.socket = address.getSockaddr(), .sequence = address.getSeq()});
  }
  return EncodeEndpoint(endpoint);
}

absl::Status GlooMesh::Connect(std::span<const std::string> endpoints) {
  NIBBLE_RETURN_IF_ERROR(ConnectPairs(endpoints));
  // Whoever connected to our pairs must be the ranks of these endpoints, connected with the same ones.
  const uint64_t hash = HashEndpoints(endpoints);
  const std::vector<Message> hello(size_, Message{&hash, sizeof(hash)});
  NIBBLE_RETURN_IF_ERROR(Round(hello, std::vector<size_t>(size_, sizeof(hash))));
  for (int p = 0; p < size_; ++p) {
    if (p != rank_ && std::memcmp(received(p), &hash, sizeof(hash)) != 0) {
      return Fail(
          absl::UnavailableError(absl::StrCat(peers_[p]->name, " connected with other endpoints than this rank")));
    }
  }
  return absl::OkStatus();
}

absl::Status GlooMesh::ConnectPairs(std::span<const std::string> endpoints) {
  if (endpoints.size() != static_cast<size_t>(size_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoints has ", endpoints.size(), " entries, the group has ", size_, " ranks"));
  }
  std::vector<GlooAddress> addresses(size_);
  for (int p = 0; p < size_; ++p) {
    auto endpoint = ParseEndpoint(endpoints[p]);
    if (!endpoint.ok()) return Annotate(endpoint.status(), absl::StrCat("endpoints[", p, "]"));
    if (endpoint->rank != static_cast<uint32_t>(p) || endpoint->size != static_cast<uint32_t>(size_)) {
      return absl::InvalidArgumentError(absl::StrCat("endpoints[", p, "] is of rank ", endpoint->rank, " of ",
                                                     endpoint->size, ", must be of rank ", p, " of ", size_));
    }
    if (endpoint->chunk_bytes != kChunkBytes) {
      return absl::InvalidArgumentError(absl::StrCat("endpoints[", p, "] has messages of ", endpoint->chunk_bytes,
                                                     " bytes, this rank has ", kChunkBytes));
    }
    if (p != rank_) addresses[p] = endpoint->addresses[rank_ < p ? rank_ : rank_ - 1];
  }
  if (endpoints[rank_] != endpoint()) {
    return absl::InvalidArgumentError(absl::StrCat("endpoints[", rank_, "] is not the endpoint this rank published"));
  }

  const Clock::time_point start = Clock::now();
  const Watchdog watchdog(timeout_, [this] { ClosePairs(); });  // Gloo waits five times the timeout
  int p = 0;
  for (p = 0; p < size_; ++p) {
    if (p == rank_) continue;
    try {
      const ::gloo::transport::tcp::Address address(addresses[p].socket, addresses[p].sequence);
      peers_[p]->name = absl::StrCat("rank ", p, " at ", address.str());
      context_->getPair(p)->connect(address.bytes());
    } catch (const std::exception& e) {
      return Fail(peers_[p]->name, e.what(), start);
    }
    if (Clock::now() - start >= timeout_) return Fail(peers_[p]->name, "not connected", start);
  }
  try {
    // Blocking reads in the caller's thread: one wake-up per message instead of two (Gloo's event thread, then us).
    for (p = 0; p < size_; ++p) {
      if (p != rank_) context_->getPair(p)->setSync(/*sync=*/true, /*busyPoll=*/false);
    }
  } catch (const std::exception& e) {
    return Fail(peers_[p]->name, e.what(), start);
  }
  std::vector<sockaddr_storage> own;
  for (p = 0; p < size_; ++p) {
    if (p != rank_) own.push_back(AddressOf(*context_->getPair(p)).getSockaddr());
  }
  sockets_ = DuplicateConnectedSockets(own);
  if (sockets_.size() != own.size()) {
    return Fail(absl::UnavailableError(absl::StrCat("found ", sockets_.size(), " of ", own.size(),
                                                    " sockets: a peer is gone, or too many open files")));
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
  for (const int socket : sockets_) shutdown(socket, SHUT_RDWR);
  return first;
}

absl::Status GlooMesh::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

}  // namespace nibble
