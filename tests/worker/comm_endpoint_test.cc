// Endpoints travel through the router: whatever arrives is parsed or refused, never trusted.
#include <gtest/gtest.h>
#include <netinet/in.h>

#include <cstring>
#include <random>

#include "worker/comm/gloo_endpoint.h"

namespace nibble {
namespace {

GlooAddress Address(int family, uint16_t port) {
  GlooAddress address;
  if (family == AF_INET) {
    sockaddr_in in = {};
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    std::memcpy(&address.socket, &in, sizeof(in));
  } else {
    sockaddr_in6 in6 = {};
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons(port);
    in6.sin6_addr = in6addr_loopback;
    in6.sin6_scope_id = 7;
    std::memcpy(&address.socket, &in6, sizeof(in6));
  }
  address.sequence = port + 5;
  return address;
}

GlooEndpoint Endpoint() {
  return {.rank = 2,
          .size = 4,
          .chunk_bytes = 65536,
          .addresses = {Address(AF_INET, 4711), Address(AF_INET6, 4712), Address(AF_INET, 65535)}};
}

TEST(GlooEndpoint, RoundTrip) {
  const std::string bytes = EncodeEndpoint(Endpoint());
  const auto parsed = ParseEndpoint(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->rank, 2u);
  EXPECT_EQ(parsed->size, 4u);
  EXPECT_EQ(parsed->chunk_bytes, 65536u);
  ASSERT_EQ(parsed->addresses.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(std::memcmp(&parsed->addresses[i].socket, &Endpoint().addresses[i].socket, sizeof(sockaddr_storage)), 0)
        << i;
    EXPECT_EQ(parsed->addresses[i].sequence, Endpoint().addresses[i].sequence);
  }
  EXPECT_EQ(EncodeEndpoint(*parsed), bytes);
}

TEST(GlooEndpoint, EveryTruncationIsRefused) {
  const std::string bytes = EncodeEndpoint(Endpoint());
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_EQ(ParseEndpoint(std::string_view(bytes).substr(0, length)).status().code(),
              absl::StatusCode::kInvalidArgument)
        << length;
  }
  EXPECT_FALSE(ParseEndpoint(bytes + '\0').ok());
}

TEST(GlooEndpoint, DamagedBytesAreRefusedOrReadAsTheyStand) {
  const std::string bytes = EncodeEndpoint(Endpoint());
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

TEST(GlooEndpoint, FieldsOutOfRange) {
  const auto with = [](const GlooEndpoint& endpoint) { return ParseEndpoint(EncodeEndpoint(endpoint)).status(); };
  GlooEndpoint endpoint = Endpoint();
  endpoint.rank = 4;
  EXPECT_EQ(with(endpoint).message(), "endpoint of rank 4 in a group of 4");
  endpoint = Endpoint();
  endpoint.size = 0xffffffffu;
  EXPECT_EQ(with(endpoint).message(), "endpoint of a group of 4294967295 ranks, must be 2..64");
  endpoint = Endpoint();
  endpoint.addresses[1] = Address(AF_INET6, 0);
  EXPECT_EQ(with(endpoint).message(), "address has port 0");
}

}  // namespace
}  // namespace nibble
