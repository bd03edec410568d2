// Endpoints travel through the router: whatever arrives is parsed or refused, never trusted.
#include "worker/comm/rank_endpoint.h"

#include <gtest/gtest.h>
#include <netinet/in.h>

#include <cstring>
#include <random>

namespace nibble {
namespace {

RankEndpoint Endpoint(int family) {
  RankEndpoint endpoint{.rank = 2, .size = 4, .chunk_bytes = 65536};
  if (family == AF_INET) {
    auto& in = reinterpret_cast<sockaddr_in&>(endpoint.address);
    in.sin_family = AF_INET;
    in.sin_port = htons(4711);
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  } else {
    auto& in6 = reinterpret_cast<sockaddr_in6&>(endpoint.address);
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons(65535);
    in6.sin6_addr = in6addr_loopback;
    in6.sin6_scope_id = 7;
  }
  for (size_t i = 0; i < endpoint.secret.size(); ++i) endpoint.secret[i] = static_cast<uint8_t>(200 + i);
  return endpoint;
}

TEST(RankEndpoint, RoundTrip) {
  for (const int family : {AF_INET, AF_INET6}) {
    const RankEndpoint endpoint = Endpoint(family);
    const std::string bytes = EncodeEndpoint(endpoint);
    const auto parsed = ParseEndpoint(bytes);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->rank, 2u);
    EXPECT_EQ(parsed->size, 4u);
    EXPECT_EQ(parsed->chunk_bytes, 65536u);
    EXPECT_EQ(std::memcmp(&parsed->address, &endpoint.address, sizeof(sockaddr_storage)), 0);
    EXPECT_EQ(parsed->secret, endpoint.secret);
    EXPECT_EQ(parsed->AddressText(), family == AF_INET ? "127.0.0.1:4711" : "[::1]:65535");
    EXPECT_EQ(EncodeEndpoint(*parsed), bytes);
  }
}

TEST(RankEndpoint, EveryTruncationIsRefused) {
  const std::string bytes = EncodeEndpoint(Endpoint(AF_INET));
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_EQ(ParseEndpoint(std::string_view(bytes).substr(0, length)).status().code(),
              absl::StatusCode::kInvalidArgument)
        << length;
  }
  EXPECT_FALSE(ParseEndpoint(bytes + '\0').ok());
}

TEST(RankEndpoint, DamagedBytesAreRefusedOrReadAsTheyStand) {
  const std::string bytes = EncodeEndpoint(Endpoint(AF_INET));
  std::mt19937_64 random(3);
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string damaged = bytes;
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips)
      damaged[random() % damaged.size()] ^= static_cast<char>(1 << (random() % 8));
    const auto parsed = ParseEndpoint(damaged);
    if (parsed.ok()) {
      EXPECT_EQ(EncodeEndpoint(*parsed).size(), bytes.size());
    } else {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(RankEndpoint, FieldsOutOfRange) {
  const auto with = [](const RankEndpoint& endpoint) { return ParseEndpoint(EncodeEndpoint(endpoint)).status(); };
  RankEndpoint endpoint = Endpoint(AF_INET);
  endpoint.rank = 4;
  EXPECT_EQ(with(endpoint).message(), "endpoint of rank 4 in a group of 4");
  endpoint = Endpoint(AF_INET);
  endpoint.size = 0xffffffffu;
  EXPECT_EQ(with(endpoint).message(), "endpoint of a group of 4294967295 ranks, must be 2..64");
  endpoint = Endpoint(AF_INET6);
  reinterpret_cast<sockaddr_in6&>(endpoint.address).sin6_port = 0;
  EXPECT_EQ(with(endpoint).message(), "address has port 0");
}

}  // namespace
}  // namespace nibble
