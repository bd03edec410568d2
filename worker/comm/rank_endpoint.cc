#include "worker/comm/rank_endpoint.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "worker/comm/communicator.h"

namespace nibble {
namespace {

// Layout, integers little-endian: magic[8], u32 rank, u32 size, u32 chunk_bytes, u8 family (4 or 6), u8[16] address,
// u16 port, u32 scope, u8[32] secret. The last character of the magic is the version.
constexpr char kMagic[] = "NBLRANK1";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr size_t kFamilyAt = kMagicBytes + 12;
constexpr size_t kIpAt = kFamilyAt + 1;
constexpr size_t kIpBytes = 16;
constexpr size_t kPortAt = kIpAt + kIpBytes;
constexpr size_t kScopeAt = kPortAt + 2;
constexpr size_t kSecretAt = kScopeAt + 4;
constexpr size_t kEndpointBytes = kSecretAt + sizeof(RankEndpoint::secret);

void AppendInteger(uint64_t value, int bytes, std::string* out) {
  for (int i = 0; i < bytes; ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

uint32_t ReadInteger(const char* at, int bytes) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint32_t>(static_cast<uint8_t>(at[i])) << (8 * i);
  return value;
}

}  // namespace

std::string RankEndpoint::AddressText() const {
  char ip[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& in = reinterpret_cast<const sockaddr_in&>(address);
    return absl::StrCat(inet_ntop(AF_INET, &in.sin_addr, ip, sizeof(ip)), ":", ntohs(in.sin_port));
  }
  const auto& in6 = reinterpret_cast<const sockaddr_in6&>(address);
  return absl::StrCat("[", inet_ntop(AF_INET6, &in6.sin6_addr, ip, sizeof(ip)), "]:", ntohs(in6.sin6_port));
}

std::string EncodeEndpoint(const RankEndpoint& endpoint) {
  char ip[kIpBytes] = {};
  uint16_t port = 0;
  uint32_t scope = 0;
  if (endpoint.address.ss_family == AF_INET) {
    const auto& in = reinterpret_cast<const sockaddr_in&>(endpoint.address);
    std::memcpy(ip, &in.sin_addr, 4);
    port = ntohs(in.sin_port);
  } else {
    NIBBLE_CHECK_EQ(endpoint.address.ss_family, AF_INET6);
    const auto& in6 = reinterpret_cast<const sockaddr_in6&>(endpoint.address);
    std::memcpy(ip, &in6.sin6_addr, kIpBytes);
    port = ntohs(in6.sin6_port);
    scope = in6.sin6_scope_id;
  }
  std::string out(kMagic, kMagicBytes);
  AppendInteger(endpoint.rank, 4, &out);
  AppendInteger(endpoint.size, 4, &out);
  AppendInteger(endpoint.chunk_bytes, 4, &out);
  out.push_back(endpoint.address.ss_family == AF_INET ? 4 : 6);
  out.append(ip, kIpBytes);
  AppendInteger(port, 2, &out);
  AppendInteger(scope, 4, &out);
  out.append(reinterpret_cast<const char*>(endpoint.secret.data()), endpoint.secret.size());
  return out;
}

absl::StatusOr<RankEndpoint> ParseEndpoint(std::string_view bytes) {
  if (bytes.size() != kEndpointBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint has ", bytes.size(), " bytes, must have ", kEndpointBytes));
  }
  if (bytes.substr(0, kMagicBytes) != std::string_view(kMagic, kMagicBytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint does not start with ", kMagic, ": another backend or another version"));
  }
  RankEndpoint endpoint;
  endpoint.rank = ReadInteger(bytes.data() + kMagicBytes, 4);
  endpoint.size = ReadInteger(bytes.data() + kMagicBytes + 4, 4);
  endpoint.chunk_bytes = ReadInteger(bytes.data() + kMagicBytes + 8, 4);
  if (endpoint.size < 2 || endpoint.size > static_cast<uint32_t>(kMaxRanks)) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint of a group of ", endpoint.size, " ranks, must be 2..", kMaxRanks));
  }
  if (endpoint.rank >= endpoint.size) {
    return absl::InvalidArgumentError(
        absl::StrCat("endpoint of rank ", endpoint.rank, " in a group of ", endpoint.size));
  }
  const int family = static_cast<uint8_t>(bytes[kFamilyAt]);
  if (family != 4 && family != 6) {
    return absl::InvalidArgumentError(absl::StrCat("address family is ", family, ", must be 4 or 6"));
  }
  const uint16_t port = static_cast<uint16_t>(ReadInteger(bytes.data() + kPortAt, 2));
  if (port == 0) return absl::InvalidArgumentError("address has port 0");
  if (family == 4) {
    auto& in = reinterpret_cast<sockaddr_in&>(endpoint.address);
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    std::memcpy(&in.sin_addr, bytes.data() + kIpAt, 4);
  } else {
    auto& in6 = reinterpret_cast<sockaddr_in6&>(endpoint.address);
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons(port);
    in6.sin6_scope_id = ReadInteger(bytes.data() + kScopeAt, 4);
    std::memcpy(&in6.sin6_addr, bytes.data() + kIpAt, kIpBytes);
  }
  std::memcpy(endpoint.secret.data(), bytes.data() + kSecretAt, endpoint.secret.size());
  return endpoint;
}

}  // namespace nibble
