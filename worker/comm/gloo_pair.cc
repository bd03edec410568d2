#include "worker/comm/gloo_pair.h"

#include <dirent.h>
#include <fcntl.h>
#include <gloo/transport/tcp/address.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/comm/descriptor.h"

namespace nibble {
namespace {

namespace tcp = ::gloo::transport::tcp;

[[noreturn]] void Throw(const char* what) { throw std::runtime_error(absl::StrCat(what, ": ", std::strerror(errno))); }

// Port 0 of a random address in 127.0.0.0/9, or in 127.128.0.0/9.
sockaddr_in RandomLoopback(bool upper_half) {
  uint8_t random[3];
  if (getentropy(random, sizeof(random)) != 0) Throw("getentropy");
  const uint32_t half = (upper_half ? 128 : 0) + random[0] % 128;
  const uint32_t ip = 127u << 24 | half << 16 | uint32_t{random[1]} << 8 | (1u + random[2] % 254);
  return {.sin_family = AF_INET, .sin_port = 0, .sin_addr = {.s_addr = htonl(ip)}};
}

// This process's sockets of which `name` (getsockname or getpeername) is at that IPv4 address.
std::vector<int> SocketsAt(const in_addr& ip, int (*name)(int, sockaddr*, socklen_t*)) {
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir("/proc/self/fd"), closedir);
  if (dir == nullptr) Throw("/proc/self/fd");
  std::vector<int> sockets;
  while (const dirent* entry = readdir(dir.get())) {
    const int fd = std::atoi(entry->d_name);  // "." and ".." read as 0, which is no socket of ours
    sockaddr_in address = {};
    socklen_t bytes = sizeof(address);
    if (name(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0 || address.sin_family != AF_INET) continue;
    if (address.sin_addr.s_addr == ip.s_addr) sockets.push_back(fd);
  }
  return sockets;
}

struct NoEvents : tcp::Handler {
  void handleEvents(int events) override {}
};

}  // namespace

std::shared_ptr<tcp::Device> MakeUnreachableDevice() {
  const sockaddr_in address = RandomLoopback(/*upper_half=*/true);
  const uint8_t* ip = reinterpret_cast<const uint8_t*>(&address.sin_addr);
  const std::string host = absl::StrCat(ip[0], ".", ip[1], ".", ip[2], ".", ip[3]);
  auto device = std::dynamic_pointer_cast<tcp::Device>(tcp::CreateDevice(tcp::attr(host.c_str())));
  // Releases of Gloo since May 2023 listen for as long as the device lives, and unregister the socket when it ends. Its
  // number is given to a file on which nothing ever happens; so they find one when they do.
  static NoEvents no_events;
  for (const int socket : SocketsAt(address.sin_addr, getsockname)) {
    const Descriptor inert(eventfd(0, EFD_CLOEXEC));
    if (!inert.open() || dup3(inert.get(), socket, O_CLOEXEC) < 0) Throw("eventfd");
    device->registerDescriptor(socket, EPOLLIN, &no_events);
  }
  return device;
}

// Gloo makes its own connections only. So it connects to a socket of this function, which never says anything, and then
// the descriptor it has for that is given the connection that is meant.
void Adopt(int connection, std::chrono::milliseconds timeout, ::gloo::transport::Pair* pair) {
  const timeval limit = {.tv_sec = timeout.count() / 1000, .tv_usec = (timeout.count() % 1000) * 1000};
  if (fcntl(connection, F_SETFL, fcntl(connection, F_GETFL) & ~O_NONBLOCK) != 0 ||
      setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) != 0 ||
      setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) != 0) {
    Throw("connection");
  }
  sockaddr_in address =
      RandomLoopback(/*upper_half=*/false);  // of two, Gloo calls from the one with the larger address
  socklen_t bytes = sizeof(address);
  const Descriptor decoy(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!decoy.open() || bind(decoy.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(decoy.get(), 1) != 0 || getsockname(decoy.get(), reinterpret_cast<sockaddr*>(&address), &bytes) != 0) {
    Throw("loopback socket");
  }
  sockaddr_storage peer = {};
  std::memcpy(&peer, &address, sizeof(address));
  pair->connect(tcp::Address(peer, 0).bytes());
  pair->setSync(/*sync=*/true, /*busyPoll=*/false);
  const std::vector<int> own = SocketsAt(address.sin_addr, getpeername);
  if (own.size() != 1) throw std::runtime_error(absl::StrCat("found ", own.size(), " sockets of a pair, not 1"));
  if (dup3(connection, own[0], O_CLOEXEC) < 0) Throw("connection");
}

}  // namespace nibble
