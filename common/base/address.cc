#include "common/base/address.h"

#include <netdb.h>
#include <netinet/in.h>
#include <spdlog/fmt/fmt.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>

namespace nibble {

std::string HostPort::ToString() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port) : fmt::format("[{}]:{}", host, port);
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  auto invalid = [&](std::string_view what) {
    return absl::InvalidArgumentError(
        fmt::format("'{}' {}; write HOST:PORT or [IPV6]:PORT", text.substr(0, 300), what));
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return invalid("has no port");
  std::string_view host = text.substr(0, colon);
  const std::string_view port_text = text.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    for (const char c : host) {
      if (!std::isxdigit(static_cast<unsigned char>(c)) && c != ':' && c != '.' && c != '%')
        return invalid("is no IPv6 address");
    }
  } else {
    for (const char c : host) {
      if (c == ':') return invalid("needs brackets around its IPv6 address");
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-' && c != '_')
        return invalid("has a host with odd characters");
    }
  }
  if (host.empty()) return invalid("has no host");
  if (host.size() > 253) return invalid("has a host of more than 253 characters");
  uint16_t port = 0;
  const char* end = port_text.data() + port_text.size();
  if (const auto [rest, error] = std::from_chars(port_text.data(), end, port); error != std::errc() || rest != end) {
    return invalid("has a port that is not 0..65535");
  }
  return HostPort{std::string(host), port};
}

absl::Status CheckCanListen(const HostPort& address) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(address.port);
  if (const int error = getaddrinfo(address.host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return absl::NotFoundError(fmt::format("cannot listen on {}: {}", address.ToString(), gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  int last_error = EADDRNOTAVAIL;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
    if (fd < 0) {
      last_error = errno;
      continue;
    }
    // As servers do: without it a port in TIME_WAIT would look taken.
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    const bool bound = bind(fd, a->ai_addr, a->ai_addrlen) == 0;
    if (!bound) last_error = errno;
    close(fd);
    if (bound) return absl::OkStatus();
    if (last_error == EADDRINUSE) break;  // a name that resolves to two families: taken in one is taken
  }
  return absl::UnavailableError(fmt::format("cannot listen on {}: {}", address.ToString(), std::strerror(last_error)));
}

}  // namespace nibble
