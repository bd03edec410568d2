#include "worker/comm/gloo_endpoint.h"

#include <netinet/in.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/comm/communicator.h"

namespace nibble {
namespace {

// Layout, integers little-endian: magic[8], u32 rank, u32 size, u32 chunk_bytes, then size - 1 addresses of
// u8 family (4 or 6), u8[16] address, u16 port, u32 scope, i64 sequence. The last character of the magic is the
// version.
constexpr char kMagic[] = "NBLGLOO1";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr size_t kHeaderBytes = kMagicBytes + 12;
constexpr size_t kAddressBytes = 1 + 16 + 2 + 4 + 8;

void AppendInteger(uint64_t value, int bytes, std::string* out) {
  for (int i = 0; i < bytes; ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

uint64_t ReadInteger(const char* at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(static_cast<uint8_t>(at[i])) << (8 * i);
  return value;
}

void AppendAddress(const GlooAddress& address, std::string* out) {
  char ip[16] = {};
  uint16_t port = 0;
  uint32_t scope = 0;
  if (address.socket.ss_family == AF_INET) {
    sockaddr_in in;
    std::memcpy(&in, &address.socket, sizeof(in));
    std::memcpy(ip, &in.sin_addr, 4);
    port = ntohs(in.sin_port);
  } else {
    NIBBLE_CHECK_EQ(address.socket.ss_family, AF_INET6);
    sockaddr_in6 in6;
    std::memcpy(&in6, &address.socket, sizeof(in6));
    std::memcpy(ip, &in6.sin6_addr, 16);
    port = ntohs(in6.sin6_port);
    scope = in6.sin6_scope_id;
  }
  out->push_back(address.socket.ss_family == AF_INET ? 4 : 6);
  out->append(ip, sizeof(ip));
  AppendInteger(port, 2, out);
  AppendInteger(scope, 4, out);
  AppendInteger(static_cast<uint64_t>(address.sequence), 8, out);
}

absl::StatusOr<GlooAddress> ParseAddress(const char* at) {
  const int family = static_cast<uint8_t>(at[0]);
  const uint16_t port = static_cast<uint16_t>(ReadInteger(at + 17, 2));
  if (family != 4 && family != 6)
    return absl::InvalidArgumentError(absl::StrCat("address family is ", family, ", must be 4 or 6"));
  if (port == 0) return absl::InvalidArgumentError("address has port 0");
  GlooAddress address;
  if (family == 4) {
    sockaddr_in in = {};
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    std::memcpy(&in.sin_addr, at + 1, 4);
    std::memcpy(&address.socket, &in, sizeof(in));
  } else {
    sockaddr_in6 in6 = {};
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons(port);
    in6.sin6_scope_id = static_cast<uint32_t>(ReadInteger(at + 19, 4));
    std::memcpy(&in6.sin6_addr, at + 1, 16);
    std::memcpy(&address.socket, &in6, sizeof(in6));
  }
  address.sequence = static_cast<int64_t>(ReadInteger(at + 23, 8));
  return address;
}

}  // namespace

std::string EncodeEndpoint(const GlooEndpoint& endpoint) {
  std::string out(kMagic, kMagicBytes);
  AppendInteger(endpoint.rank, 4, &out);
  AppendInteger(endpoint.size, 4, &out);
  AppendInteger(endpoint.chunk_bytes, 4, &out);
  for (const GlooAddress& address : endpoint.addresses) AppendAddress(address, &out);
  return out;
}

absl::StatusOr<GlooEndpoint> ParseEndpoint(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint has ", bytes.size(), " bytes, fewer than its header of ", kHeaderBytes));
  }
  if (bytes.substr(0, kMagicBytes) != std::string_view(kMagic, kMagicBytes)) {
    return absl::InvalidArgumentError("endpoint does not start with NBLGLOO1: another backend or another version");
  }
  GlooEndpoint endpoint;
  endpoint.rank = static_cast<uint32_t>(ReadInteger(bytes.data() + kMagicBytes, 4));
  endpoint.size = static_cast<uint32_t>(ReadInteger(bytes.data() + kMagicBytes + 4, 4));
  endpoint.chunk_bytes = static_cast<uint32_t>(ReadInteger(bytes.data() + kMagicBytes + 8, 4));
  if (endpoint.size < 2 || endpoint.size > static_cast<uint32_t>(kMaxRanks)) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint of a group of ", endpoint.size, " ranks, must be 2..", kMaxRanks));
  }
  if (endpoint.rank >= endpoint.size) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint of rank ", endpoint.rank, " in a group of ", endpoint.size));
  }
  const size_t wanted = kHeaderBytes + (endpoint.size - 1) * kAddressBytes;
  if (bytes.size() != wanted) {
    return absl::InvalidArgumentError(absl::StrCat("endpoint has ", bytes.size(), " bytes, must have ", wanted));
  }
  for (uint32_t i = 0; i + 1 < endpoint.size; ++i) {
    NIBBLE_ASSIGN_OR_RETURN(GlooAddress address, ParseAddress(bytes.data() + kHeaderBytes + i * kAddressBytes));
    endpoint.addresses.push_back(address);
  }
  return endpoint;
}

}  // namespace nibble
