// What a rank publishes so that the others can reach it, and know that they are of its group: an address and a secret.
// The bytes travel through the router, so they are parsed as untrusted input.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace nibble {

struct RankEndpoint {
  uint32_t rank = 0;
  uint32_t size = 0;
  uint32_t chunk_bytes = 0;          // of one message; all ranks must agree on it
  sockaddr_storage address = {};     // AF_INET or AF_INET6, port not 0
  std::array<uint8_t, 32> secret{};  // random; whoever connects to the address shows it

  std::string AddressText() const;  // "127.0.0.1:4711", "[::1]:4711"
};

std::string EncodeEndpoint(const RankEndpoint& endpoint);

// INVALID_ARGUMENT, saying what is wrong, for anything EncodeEndpoint does not write.
absl::StatusOr<RankEndpoint> ParseEndpoint(std::string_view bytes);

}  // namespace nibble
