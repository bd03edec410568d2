#include "common/base/address.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

namespace nibble {
namespace {

TEST(ParseHostPort, AcceptsNamesAndBothFamilies) {
  EXPECT_EQ(ParseHostPort("localhost:50051")->host, "localhost");
  EXPECT_EQ(ParseHostPort("0.0.0.0:0")->port, 0);
  EXPECT_EQ(ParseHostPort("[::1]:65535")->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]:65535")->ToString(), "[::1]:65535");
  EXPECT_EQ(ParseHostPort("worker-0.workers.default.svc:50061")->ToString(), "worker-0.workers.default.svc:50061");
}

TEST(ParseHostPort, RefusesTheRestAndQuotesIt) {
  for (const char* text :
       {"", "localhost", ":50051", "localhost:", "localhost:65536", "localhost:-1", "localhost:+1", "localhost:1x",
        "::1:50051", "[::1]", "[]:1", "[zz]:1", "a b:1", "http://localhost:80", "localhost: 80"}) {
    const auto parsed = ParseHostPort(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(parsed.status().message().find("'" + std::string(text) + "'"), std::string::npos) << parsed.status();
  }
  EXPECT_FALSE(ParseHostPort(std::string(300, 'a') + ":1").ok());
}

TEST(CheckCanListen, NamesATakenPort) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_GE(fd, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t size = sizeof(address);
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const HostPort taken{"127.0.0.1", ntohs(address.sin_port)};
  const absl::Status status = CheckCanListen(taken);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(std::string(status.message()), "cannot listen on " + taken.ToString() + ": Address already in use");
  close(fd);
  EXPECT_TRUE(CheckCanListen(taken).ok());
}

TEST(CheckCanListen, NamesAForeignAddress) {
  EXPECT_FALSE(CheckCanListen({"192.0.2.1", 0}).ok());  // TEST-NET-1: nobody's own address
}

}  // namespace
}  // namespace nibble
