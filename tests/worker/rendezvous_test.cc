// Strangers at the port where the ranks of a group meet: whatever they do, ranks find each other or say why not.
#include "worker/comm/rendezvous.h"

#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "tests/worker/comm_ranks.h"
#include "worker/comm/descriptor.h"
#include "worker/comm/rank_endpoint.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

constexpr char kMagic[] = "NBLMEET1";

// A connection to where the endpoint's rank listens; none when it is refused.
Descriptor Dial(const std::string& endpoint) {
  const auto parsed = ParseEndpoint(endpoint);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  Descriptor connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const bool connected =
      connect(connection.get(), reinterpret_cast<const sockaddr*>(&parsed->address), sizeof(sockaddr_in)) == 0;
  return connected ? std::move(connection) : Descriptor();
}

void Send(const Descriptor& connection, const std::string& bytes) {
  send(connection.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

// Gloo's header of a message: bytes, operation, slot, offset, length, offset at the receiver.
std::string GlooHeader(std::array<size_t, 6> fields) {
  return std::string(reinterpret_cast<const char*>(fields.data()), sizeof(fields));
}

std::vector<std::string> HostileBytes() {
  const size_t before_the_buffer = static_cast<size_t>(-65536);
  return {"",
          "x",
          "GET / HTTP/1.1\r\n\r\n",
          std::string(kMagic).substr(0, 5),
          kMagic + std::string(48, '\0'),
          kMagic + std::string(48, '\xff'),
          std::string(1 << 20, 'A'),
          GlooHeader({48 + 65536, 0, 0, 0, 65536, before_the_buffer}) + std::string(65536, 'A'),
          GlooHeader({48, 1, 5, 0, 0, 0}),
          GlooHeader({48, 0, 77, 0, 0, 0}),
          GlooHeader({48, 2, 0, 0, 0, 0}),
          GlooHeader({48, 99, 0, 0, 0, 0})};
}

std::vector<std::string> EndpointsOf(const std::vector<std::unique_ptr<PendingCommunicator>>& pending) {
  std::vector<std::string> endpoints;
  for (const auto& p : pending) endpoints.push_back(p->endpoint());
  return endpoints;
}

// All ranks connect and add up.
void ExpectGroupWorks(const std::vector<std::unique_ptr<PendingCommunicator>>& pending) {
  const std::vector<std::string> endpoints = EndpointsOf(pending);
  const int size = static_cast<int>(pending.size());
  OnRanks(size, [&](int r) {
    auto connected = pending[r]->Connect(endpoints);
    ASSERT_TRUE(connected.ok()) << connected.status();
    std::vector<float> one(100, 1);
    ASSERT_TRUE((*connected)->AllReduceSum({.data = one.data(), .dtype = DType::kF32, .rows = 1, .cols = 100}).ok());
    EXPECT_EQ(one, std::vector<float>(100, static_cast<float>(size)));
  });
}

int NumOpenFiles(bool only_listening) {
  int count = 0;
  DIR* dir = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(dir)) {
    if (entry->d_name[0] == '.') continue;
    int listening = 0;
    socklen_t bytes = sizeof(listening);
    getsockopt(std::atoi(entry->d_name), SOL_SOCKET, SO_ACCEPTCONN, &listening, &bytes);
    count += !only_listening || listening != 0;
  }
  closedir(dir);
  return count;
}

TEST(Strangers, BeforeTheRanksConnect) {
  for (const int size : {2, 3}) {
    const auto pending = PrepareAll(size, seconds(60));
    std::vector<Descriptor> strangers;
    for (const std::string& endpoint : EndpointsOf(pending)) {
      for (const std::string& bytes : HostileBytes()) {
        strangers.push_back(Dial(endpoint));
        Send(strangers.back(), bytes);
      }
    }
    ExpectGroupWorks(pending);
  }
}

TEST(Strangers, WhileTheRanksConnect) {
  const auto pending = PrepareAll(3, seconds(60));
  const std::vector<std::string> endpoints = EndpointsOf(pending);
  const std::vector<std::string> hostile = HostileBytes();
  std::atomic<bool> done = false;
  std::atomic<int> connections = 0;
  std::vector<std::jthread> flood;
  for (int r = 0; r < 2; ++r) {
    flood.emplace_back([&, r] {
      std::vector<Descriptor> open(200);  // more than are heard at the same time
      for (size_t i = 0; !done; ++i) {
        Descriptor& stranger = open[i % open.size()];
        stranger = Dial(endpoints[r]);
        if (!stranger.open()) continue;  // the ranks have met
        Send(stranger, hostile[i % hostile.size()]);
        ++connections;
      }
    });
  }
  while (connections < 100) std::this_thread::yield();  // the kernel keeps some more before anybody accepts
  ExpectGroupWorks(pending);
  done = true;
}

TEST(Strangers, AfterTheRanksConnected) {
  const int listening = NumOpenFiles(/*only_listening=*/true);
  const auto pending = PrepareAll(3, seconds(60));
  const std::vector<std::string> endpoints = EndpointsOf(pending);
  EXPECT_EQ(NumOpenFiles(true), listening + 3);
  std::vector<std::unique_ptr<Communicator>> communicators(3);
  OnRanks(3, [&](int r) { communicators[r] = *pending[r]->Connect(endpoints); });
  EXPECT_EQ(NumOpenFiles(true), listening) << "Gloo's own sockets included";
  for (const std::string& endpoint : endpoints) EXPECT_FALSE(Dial(endpoint).open());
}

TEST(Strangers, LeaveNoDescriptorsBehind) {
  const int before = NumOpenFiles(/*only_listening=*/false);
  for (int i = 0; i < 3; ++i) {
    auto pending = PrepareAll(2, milliseconds(200));
    const auto endpoint = ParseEndpoint(pending[0]->endpoint());
    std::vector<Descriptor> strangers;
    for (int j = 0; j < 150; ++j) {  // more than the kernel keeps: not every connection is made
      strangers.emplace_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      connect(strangers.back().get(), reinterpret_cast<const sockaddr*>(&endpoint->address), sizeof(sockaddr_in));
    }
    const auto endpoints = EndpointsOf(pending);
    EXPECT_EQ(pending[0]->Connect(endpoints).status().code(), absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_EQ(NumOpenFiles(false), before);
}

// Strangers who say nothing, or a byte now and then, must not keep a waiting rank busy.
TEST(Strangers, CostNoProcessorTime) {
  auto rank0 = Rendezvous::Open(0, 2, 65536, "127.0.0.1");
  auto rank1 = Rendezvous::Open(1, 2, 65536, "127.0.0.1");
  ASSERT_TRUE(rank0.ok() && rank1.ok());
  const std::vector<std::string> endpoints = {rank0->endpoint(), rank1->endpoint()};
  std::vector<Descriptor> strangers;
  for (size_t i = 0; i < 32; ++i) {
    strangers.push_back(Dial(endpoints[0]));
    Send(strangers.back(), std::string(kMagic).substr(0, i % 8));
  }
  const std::clock_t start = std::clock();  // of the whole process
  const absl::Status status = rank0->Meet(endpoints, seconds(1)).status();
  EXPECT_LT(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC, 0.3);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 did not connect within 1000 ms"));
}

// Everything right but the secret.
TEST(Strangers, WithoutTheSecretAreNoRank) {
  auto rank0 = Rendezvous::Open(0, 2, 65536, "127.0.0.1");
  auto rank1 = Rendezvous::Open(1, 2, 65536, "127.0.0.1");
  ASSERT_TRUE(rank0.ok() && rank1.ok());
  const std::vector<std::string> endpoints = {rank0->endpoint(), rank1->endpoint()};
  const Descriptor stranger = Dial(endpoints[0]);
  const uint32_t from = 1, to = 0;
  std::string greeting = kMagic;
  greeting.append(reinterpret_cast<const char*>(&from), 4).append(reinterpret_cast<const char*>(&to), 4);
  greeting.append(8, '\0').append(32, '\0');
  Send(stranger, greeting);
  const absl::Status status = rank0->Meet(endpoints, milliseconds(300)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("1 connections by others were refused"));
  char answer;
  EXPECT_LE(recv(stranger.get(), &answer, 1, 0), 0) << "a stranger was answered";
}

// A rank died and something else listens at its port now: the caller notices by the answer.
TEST(Strangers, AtTheOtherEndAreNoRank) {
  for (const std::string& bytes : HostileBytes()) {
    auto rank1 = Rendezvous::Open(1, 2, 65536, "127.0.0.1");
    ASSERT_TRUE(rank1.ok());
    Descriptor listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    RankEndpoint dead{.rank = 0, .size = 2, .chunk_bytes = 65536};
    auto& address = reinterpret_cast<sockaddr_in&>(dead.address);
    address = {.sin_family = AF_INET, .sin_port = 0, .sin_addr = {.s_addr = htonl(INADDR_LOOPBACK)}};
    ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    ASSERT_EQ(listen(listener.get(), 8), 0);
    socklen_t length = sizeof(address);
    getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length);
    const std::vector<std::string> endpoints = {EncodeEndpoint(dead), rank1->endpoint()};
    std::jthread stranger([&](std::stop_token stop) {
      std::vector<Descriptor> calls;
      pollfd waiting{.fd = listener.get(), .events = POLLIN, .revents = 0};
      while (!stop.stop_requested()) {
        if (poll(&waiting, 1, 5) != 1) continue;
        calls.emplace_back(accept(listener.get(), nullptr, nullptr));
        Send(calls.back(), bytes);
      }
    });
    const absl::Status status = rank1->Meet(endpoints, milliseconds(200)).status();
    EXPECT_TRUE(status.code() == absl::StatusCode::kUnavailable || status.code() == absl::StatusCode::kDeadlineExceeded)
        << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0 at 127.0.0.1:"));
  }
}

TEST(Ranks, GivenOtherEndpointsAreNamed) {
  std::vector<Rendezvous> ranks;
  std::vector<std::string> endpoints;
  for (int r = 0; r < 3; ++r) {
    ranks.push_back(*Rendezvous::Open(r, 3, 65536, "127.0.0.1"));
    endpoints.push_back(ranks.back().endpoint());
  }
  std::vector<std::string> others = endpoints;
  others[2] = Rendezvous::Open(2, 3, 65536, "127.0.0.1")->endpoint();
  absl::Status statuses[2];
  OnRanks(2, [&](int r) { statuses[r] = ranks[r].Meet(r == 0 ? endpoints : others, seconds(60)).status(); });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("rank 1 connected with other endpoints"));
  EXPECT_FALSE(statuses[1].ok());
}

}  // namespace
}  // namespace nibble::testing
