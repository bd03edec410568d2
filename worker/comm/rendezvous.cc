#include "worker/comm/rendezvous.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace nibble {
namespace {

// Of the kernel's queue in front of Meet. A rank that finds it full is sent again by its kernel within a second.
constexpr int kBacklog = 128;
constexpr std::chrono::milliseconds kPauseBetweenCalls(10);

// A greeting: magic[8], u32 from, u32 to, u64 hash of all endpoints, u8[32] secret of the rank it is sent to.
constexpr char kMagic[] = "NBLMEET1";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr size_t kFromAt = kMagicBytes;
constexpr size_t kSecretAt = kMagicBytes + 16;

// FNV-1a: the same on every machine, unlike absl::Hash.
uint64_t Hash(std::span<const std::string> texts) {
  uint64_t hash = 14695981039346656037ull;
  for (const std::string& text : texts) {
    for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  }
  return hash;
}

// In a time that does not tell where two secrets differ.
bool SameSecret(const uint8_t* a, const uint8_t* b) {
  uint8_t difference = 0;
  for (size_t i = 0; i < sizeof(RankEndpoint::secret); ++i) difference |= a[i] ^ b[i];
  return difference == 0;
}

socklen_t Length(const sockaddr_storage& address) {
  return address.ss_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
}

// False when the deadline passed first.
bool WaitFor(int fd, short events, std::chrono::steady_clock::time_point deadline) {
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    pollfd waiting{.fd = fd, .events = events, .revents = 0};
    if (poll(&waiting, 1, static_cast<int>(left.count())) > 0) return true;
  }
}

// Greetings are far smaller than any socket buffer: one that is not taken whole is of a broken connection.
bool SendWhole(int fd, const std::string& bytes) {
  return send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

void SendSmallMessagesAtOnce(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

absl::StatusOr<Descriptor> Listen(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found); error != 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on host ", host, ": ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  int error = 0;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    Descriptor listener(socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, at->ai_protocol));
    if (listener.open() && bind(listener.get(), at->ai_addr, at->ai_addrlen) == 0 &&
        listen(listener.get(), kBacklog) == 0) {
      return listener;
    }
    error = errno;
  }
  return absl::UnavailableError(absl::StrCat("cannot listen on host ", host, ": ", std::strerror(error)));
}

}  // namespace

struct Rendezvous::Stranger {
  Descriptor socket;
  uint8_t greeting[kGreetingBytes] = {};
  size_t received = 0;

  // False when nothing more can come of this connection.
  bool Hear() {
    const ssize_t got = recv(socket.get(), greeting + received, kGreetingBytes - received, 0);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    received += static_cast<size_t>(got);
    return got > 0;
  }
};

absl::StatusOr<Rendezvous> Rendezvous::Open(int rank, int size, uint32_t chunk_bytes, const std::string& host) {
  NIBBLE_ASSIGN_OR_RETURN(Descriptor listener, Listen(host));
  RankEndpoint own{
      .rank = static_cast<uint32_t>(rank), .size = static_cast<uint32_t>(size), .chunk_bytes = chunk_bytes};
  socklen_t length = sizeof(own.address);
  if (getsockname(listener.get(), reinterpret_cast<sockaddr*>(&own.address), &length) != 0 ||
      getentropy(own.secret.data(), own.secret.size()) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot make an endpoint on host ", host, ": ", std::strerror(errno)));
  }
  return Rendezvous(own, std::move(listener));
}

absl::StatusOr<std::vector<Descriptor>> Rendezvous::Meet(std::span<const std::string> endpoints,
                                                         std::chrono::milliseconds timeout) {
  const Clock::time_point deadline = Clock::now() + timeout;
  timeout_ = timeout;
  NIBBLE_RETURN_IF_ERROR(ParseAll(endpoints));
  // First the calls, then the answers: rank 0 only answers, so somebody always does.
  std::vector<Descriptor> ranks(own_.size);
  for (uint32_t r = 0; r < own_.rank; ++r) {
    NIBBLE_ASSIGN_OR_RETURN(ranks[r], Call(ranks_[r], deadline));
  }
  const absl::Status received = ReceiveCalls(deadline, &ranks);
  listener_.Close();
  NIBBLE_RETURN_IF_ERROR(received);
  return ranks;
}

absl::Status Rendezvous::ParseAll(std::span<const std::string> endpoints) {
  if (endpoints.size() != own_.size) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoints has ", endpoints.size(), " entries, the group has ", own_.size, " ranks"));
  }
  for (uint32_t r = 0; r < own_.size; ++r) {
    absl::StatusOr<RankEndpoint> endpoint = ParseEndpoint(endpoints[r]);
    if (!endpoint.ok()) return Annotate(endpoint.status(), absl::StrCat("endpoints[", r, "]"));
    if (endpoint->rank != r || endpoint->size != own_.size) {
      return absl::InvalidArgumentError(absl::StrCat("endpoints[", r, "] is of rank ", endpoint->rank, " of ",
                                                     endpoint->size, ", must be of rank ", r, " of ", own_.size));
    }
    if (endpoint->chunk_bytes != own_.chunk_bytes) {
      return absl::InvalidArgumentError(absl::StrCat("endpoints[", r, "] has messages of ", endpoint->chunk_bytes,
                                                     " bytes, this rank has ", own_.chunk_bytes));
    }
    ranks_.push_back(*std::move(endpoint));
  }
  if (endpoints[own_.rank] != endpoint()) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoints[", own_.rank, "] is not the endpoint this rank published"));
  }
  hash_ = Hash(endpoints);
  return absl::OkStatus();
}

std::string Rendezvous::Greeting(uint32_t from, uint32_t to) const {
  std::string greeting(kGreetingBytes, '\0');
  std::memcpy(greeting.data(), kMagic, kMagicBytes);
  std::memcpy(greeting.data() + kFromAt, &from, sizeof(from));
  std::memcpy(greeting.data() + kFromAt + 4, &to, sizeof(to));
  std::memcpy(greeting.data() + kFromAt + 8, &hash_, sizeof(hash_));
  std::memcpy(greeting.data() + kSecretAt, ranks_[to].secret.data(), ranks_[to].secret.size());
  return greeting;
}

// Calls again while the connection breaks before an answer: the other side may have dropped it in a flood of strangers.
absl::StatusOr<Descriptor> Rendezvous::Call(const RankEndpoint& peer, Clock::time_point deadline) {
  while (true) {
    NIBBLE_ASSIGN_OR_RETURN(Descriptor connection, CallOnce(peer, deadline));
    if (connection.open()) return connection;
    poll(nullptr, 0, static_cast<int>(kPauseBetweenCalls.count()));
  }
}

// None when the connection broke. A port that refuses stays closed: that rank is gone.
absl::StatusOr<Descriptor> Rendezvous::CallOnce(const RankEndpoint& peer, Clock::time_point deadline) {
  const auto late = [&] {
    return absl::DeadlineExceededError(
        absl::StrCat(NameOf(peer.rank), " did not answer within ", timeout_.count(), " ms"));
  };
  const auto gone = [&](int error) {
    return absl::UnavailableError(absl::StrCat(NameOf(peer.rank), ": ", std::strerror(error)));
  };
  Descriptor connection(socket(peer.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!connection.open()) return gone(errno);
  if (connect(connection.get(), reinterpret_cast<const sockaddr*>(&peer.address), Length(peer.address)) != 0) {
    if (errno != EINPROGRESS) return gone(errno);
    if (!WaitFor(connection.get(), POLLOUT, deadline)) return late();
    int error = 0;
    socklen_t length = sizeof(error);
    getsockopt(connection.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return gone(error);
  }
  SendSmallMessagesAtOnce(connection.get());
  if (!SendWhole(connection.get(), Greeting(own_.rank, peer.rank))) return Descriptor();
  Stranger stranger{.socket = std::move(connection)};
  while (stranger.received < kGreetingBytes) {
    if (!WaitFor(stranger.socket.get(), POLLIN, deadline)) return late();
    if (!stranger.Hear()) return Descriptor();
  }
  const std::string expected = Greeting(peer.rank, own_.rank);
  if (std::memcmp(stranger.greeting, expected.data(), kSecretAt) != 0 ||
      !SameSecret(stranger.greeting + kSecretAt, own_.secret.data())) {
    return absl::UnavailableError(
        absl::StrCat(NameOf(peer.rank), " did not answer as a rank of this group: another process has its port"));
  }
  return std::move(stranger.socket);
}

absl::Status Rendezvous::ReceiveCalls(Clock::time_point deadline, std::vector<Descriptor>* ranks) {
  std::vector<Stranger> strangers;
  while (true) {
    const auto missing = std::find_if(ranks->begin() + own_.rank + 1, ranks->end(),
                                      [](const Descriptor& connection) { return !connection.open(); });
    if (missing == ranks->end()) return absl::OkStatus();
    std::vector<pollfd> waiting{{.fd = listener_.get(), .events = POLLIN, .revents = 0}};
    for (const Stranger& s : strangers) waiting.push_back({.fd = s.socket.get(), .events = POLLIN, .revents = 0});
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) {
      return absl::DeadlineExceededError(absl::StrCat("rank ", missing - ranks->begin(), " did not connect within ",
                                                      timeout_.count(), " ms; ", num_refused_,
                                                      " connections by others were refused"));
    }
    if (poll(waiting.data(), waiting.size(), static_cast<int>(left.count())) < 0) continue;  // a signal
    std::vector<Stranger> still;
    for (size_t i = 0; i < strangers.size(); ++i) {
      if (waiting[i + 1].revents != 0 && !strangers[i].Hear()) {
        ++num_refused_;
      } else if (strangers[i].received == kGreetingBytes) {
        NIBBLE_RETURN_IF_ERROR(Judge(std::move(strangers[i]), ranks));
      } else {
        still.push_back(std::move(strangers[i]));
      }
    }
    strangers = std::move(still);
    if (waiting[0].revents != 0) NIBBLE_RETURN_IF_ERROR(Accept(&strangers));
  }
}

absl::Status Rendezvous::Accept(std::vector<Stranger>* strangers) {
  for (size_t i = 0; i < kMaxStrangers; ++i) {  // then the others are heard again
    Descriptor connection(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!connection.open()) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        return absl::UnavailableError(absl::StrCat("cannot accept connections of other ranks: ", std::strerror(errno)));
      }
      return absl::OkStatus();  // none is left, or one that broke already
    }
    if (strangers->size() == kMaxStrangers) {
      strangers->erase(strangers->begin());
      ++num_refused_;
    }
    strangers->push_back({.socket = std::move(connection)});
  }
  return absl::OkStatus();
}

absl::Status Rendezvous::Judge(Stranger stranger, std::vector<Descriptor>* ranks) {
  if (std::memcmp(stranger.greeting, kMagic, kMagicBytes) != 0 ||
      !SameSecret(stranger.greeting + kSecretAt, own_.secret.data())) {
    ++num_refused_;
    return absl::OkStatus();
  }
  uint32_t from = 0;
  std::memcpy(&from, stranger.greeting + kFromAt, sizeof(from));
  if (from <= own_.rank || from >= own_.size ||
      std::memcmp(stranger.greeting, Greeting(from, own_.rank).data(), kSecretAt) != 0) {
    return absl::UnavailableError(
        absl::StrCat("rank ", from, " connected with other endpoints than rank ", own_.rank, " was given"));
  }
  if (!SendWhole(stranger.socket.get(), Greeting(own_.rank, from))) return absl::OkStatus();  // it calls again
  SendSmallMessagesAtOnce(stranger.socket.get());
  (*ranks)[from] = std::move(stranger.socket);
  return absl::OkStatus();
}

}  // namespace nibble
