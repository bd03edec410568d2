// What a rank publishes so that the others can reach it: one TCP address per peer. The bytes travel through the router,
// so they are parsed as untrusted input.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

struct GlooAddress {
  sockaddr_storage socket = {};  // AF_INET or AF_INET6, port not 0
  int64_t sequence = -1;         // Gloo's number of the pair behind a shared listening socket; -1 before Gloo had one
};

struct GlooEndpoint {
  uint32_t rank = 0;
  uint32_t size = 0;
  uint32_t chunk_bytes = 0;            // of one message; all ranks must agree on it
  std::vector<GlooAddress> addresses;  // [size - 1]: where peer p connects, p skipping rank
};

std::string EncodeEndpoint(const GlooEndpoint& endpoint);

// INVALID_ARGUMENT, saying what is wrong, for anything EncodeEndpoint does not write.
absl::StatusOr<GlooEndpoint> ParseEndpoint(std::string_view bytes);

}  // namespace nibble
