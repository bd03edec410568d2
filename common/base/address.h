// HOST:PORT, as flags and configuration files write it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nibble {

struct HostPort {
  std::string host;  // name, IPv4, or IPv6 without brackets
  uint16_t port = 0;

  std::string ToString() const;  // brackets around IPv6
};

// "localhost:50051", "0.0.0.0:0", "[::1]:50051". INVALID_ARGUMENT quotes the text and says what is wrong with it.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);

// Whether a server could listen there now. Servers' own libraries log or throw when they cannot; this names address and
// reason: "cannot listen on 127.0.0.1:50061: Address already in use". UNAVAILABLE, or NOT_FOUND for an unknown host.
absl::Status CheckCanListen(const HostPort& address);

}  // namespace nibble
