// Collectives: the sums bit by bit, the gather by position, and every way a peer can fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "common/base/float16.h"
#include "tests/worker/comm_ranks.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

// Values whose sum depends on the order of the additions.
std::vector<float> Values(int rank, int64_t count) {
  std::mt19937_64 random(static_cast<uint64_t>(1000 + rank));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values)
    v = std::ldexp(static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f, static_cast<int>(random() % 24));
  return values;
}

struct ReduceCase {
  int ranks;
  int64_t count;
};

class AllReduce : public ::testing::TestWithParam<ReduceCase> {};

TEST_P(AllReduce, AddsInRankOrderWithOneRounding) {
  const auto [ranks, count] = GetParam();
  std::vector<float> sum(static_cast<size_t>(count));
  std::vector<BF16> rounded_sum(static_cast<size_t>(count));
  std::vector<std::vector<float>> parts;
  for (int r = 0; r < ranks; ++r) parts.push_back(Values(r, count));
  for (int64_t i = 0; i < count; ++i) {
    float f32 = parts[0][i], bf16 = RoundToBF16(parts[0][i]);
    for (int r = 1; r < ranks; ++r) {
      f32 += parts[r][i];
      bf16 += RoundToBF16(parts[r][i]);
    }
    sum[i] = f32;
    rounded_sum[i] = ToBF16(bf16);
  }

  const auto communicators = ConnectAll(ranks);
  OnRanks(ranks, [&](int r) {
    Communicator& comm = *communicators[r];
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::vector<float> f32 = parts[r];
      ASSERT_TRUE(comm.AllReduceSum({.data = f32.data(), .dtype = DType::kF32, .rows = 1, .cols = count}).ok());
      EXPECT_EQ(std::memcmp(f32.data(), sum.data(), f32.size() * sizeof(float)), 0) << "rank " << r;
      std::vector<BF16> bf16(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) bf16[i] = ToBF16(parts[r][i]);
      ASSERT_TRUE(comm.AllReduceSum({.data = bf16.data(), .dtype = DType::kBF16, .rows = 1, .cols = count}).ok());
      EXPECT_EQ(std::memcmp(bf16.data(), rounded_sum.data(), bf16.size() * sizeof(BF16)), 0) << "rank " << r;
    }
  });
}

// Sizes around one message, one chunk, and the change to slices; three ranks do not divide them.
INSTANTIATE_TEST_SUITE_P(Sizes, AllReduce,
                         ::testing::Values(ReduceCase{1, 100}, ReduceCase{2, 1}, ReduceCase{2, 512},
                                           ReduceCase{2, 40000}, ReduceCase{3, 7}, ReduceCase{3, 16384},
                                           ReduceCase{3, 16385}, ReduceCase{3, 100001}, ReduceCase{4, 512},
                                           ReduceCase{4, 65539}),
                         [](const auto& c) { return absl::StrCat("R", c.param.ranks, "x", c.param.count); });

struct GatherCase {
  int ranks;
  int64_t rows;
  int64_t row_bytes;
};

class AllGather : public ::testing::TestWithParam<GatherCase> {};

TEST_P(AllGather, PutsColumnsInRankOrder) {
  const auto [ranks, rows, row_bytes] = GetParam();
  const auto value = [](int rank, int64_t row, int64_t byte) {
    return static_cast<uint8_t>(rank * 91 + row * 7 + byte * 13 + byte / 256);
  };
  const auto communicators = ConnectAll(ranks);
  OnRanks(ranks, [&](int r) {
    std::vector<uint8_t> in(static_cast<size_t>(rows * row_bytes)), out(in.size() * ranks, 0xee);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b < row_bytes; ++b) in[i * row_bytes + b] = value(r, i, b);
    }
    ASSERT_TRUE(communicators[r]->AllGather(in.data(), rows, static_cast<size_t>(row_bytes), out.data()).ok());
    int64_t wrong = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b < ranks * row_bytes; ++b) {
        wrong += out[i * ranks * row_bytes + b] != value(static_cast<int>(b / row_bytes), i, b % row_bytes);
      }
    }
    EXPECT_EQ(wrong, 0) << "rank " << r;
  });
}

INSTANTIATE_TEST_SUITE_P(Shapes, AllGather,
                         ::testing::Values(GatherCase{1, 3, 5}, GatherCase{2, 1, 1}, GatherCase{2, 33, 8192},
                                           GatherCase{2, 2, 200000}, GatherCase{3, 5, 65536}, GatherCase{4, 17, 1000}));

// ---- failures ------------------------------------------------------------------------------------------------------

absl::Status Reduce(Communicator& comm, int64_t count = 512) {
  std::vector<float> data(static_cast<size_t>(count));
  return comm.AllReduceSum({.data = data.data(), .dtype = DType::kF32, .rows = 1, .cols = count});
}

TEST(Failure, AbortUnblocksAtOnceAndStays) {
  for (const int ranks : {2, 3}) {
    const auto communicators = ConnectAll(ranks, seconds(60));
    const Clock::time_point start = Clock::now();
    std::jthread aborter;
    absl::Status blocked;
    {
      std::jthread waiting([&] { blocked = Reduce(*communicators[0]); });  // the others never come
      aborter = std::jthread([&] { communicators[0]->Abort("operator's wish"); });
    }
    EXPECT_EQ(blocked.code(), absl::StatusCode::kCancelled) << blocked;
    EXPECT_THAT(std::string(blocked.message()), HasSubstr("operator's wish"));
    EXPECT_EQ(Reduce(*communicators[0]).code(), absl::StatusCode::kCancelled);
    communicators[0]->Abort("again");
    // The other ranks read what rank 0 had sent, then the end of the stream, long before their own timeout.
    OnRanks(ranks, [&](int r) {
      if (r == 0) return;
      absl::Status status;
      for (int i = 0; i < 3 && status.ok(); ++i) status = Reduce(*communicators[static_cast<size_t>(r)]);
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    });
    EXPECT_LT(Clock::now() - start, seconds(20));
  }
}

TEST(Failure, SoloAbort) {
  auto communicators = ConnectAll(1);
  EXPECT_TRUE(Reduce(*communicators[0]).ok());
  communicators[0]->Abort("enough");
  EXPECT_EQ(Reduce(*communicators[0]).code(), absl::StatusCode::kCancelled);
}

TEST(Failure, SilentPeerIsADeadline) {
  const auto communicators = ConnectAll(2, milliseconds(300));
  const absl::Status status = Reduce(*communicators[0]);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  EXPECT_EQ(Reduce(*communicators[0]).code(), absl::StatusCode::kDeadlineExceeded) << "unusable after an error";
}

TEST(Failure, DifferentPlansAreNoticed) {
  const auto communicators = ConnectAll(2);
  std::vector<absl::Status> statuses(2);
  OnRanks(2, [&](int r) { statuses[r] = Reduce(*communicators[r], r == 0 ? 512 : 1024); });
  EXPECT_TRUE(statuses[0].code() == absl::StatusCode::kInternal || statuses[1].code() == absl::StatusCode::kInternal)
      << statuses[0] << " and " << statuses[1];
  EXPECT_FALSE(statuses[0].ok());
  EXPECT_FALSE(statuses[1].ok());
}

TEST(Failure, MissingRankIsADeadlineOfConnect) {
  auto pending = PrepareAll(2, milliseconds(300));
  const std::vector<std::string> endpoints = {pending[0]->endpoint(), pending[1]->endpoint()};
  const Clock::time_point start = Clock::now();
  std::vector<absl::Status> statuses;
  for (int r = 0; r < 2; ++r) statuses.push_back(pending[r]->Connect(endpoints).status());
  // One of the two listens and waits; the other may find it gone already.
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_FALSE(statuses[1].ok());
  EXPECT_LT(Clock::now() - start, seconds(10));
}

TEST(Failure, GonePeerOfConnect) {
  auto pending = PrepareAll(2, seconds(1));
  const std::vector<std::string> endpoints = {pending[0]->endpoint(), pending[1]->endpoint()};
  pending[1].reset();
  EXPECT_FALSE(pending[0]->Connect(endpoints).ok());
}

TEST(Failure, OptionsOutOfRange) {
  EXPECT_EQ(PrepareCommunicator({.rank = 0, .size = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PrepareCommunicator({.rank = 2, .size = 2}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PrepareCommunicator({.rank = -1, .size = 2}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PrepareCommunicator({.rank = 0, .size = 65}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PrepareCommunicator({.rank = 0, .size = 2, .timeout = milliseconds(0)}).status().code(),
            absl::StatusCode::kInvalidArgument);
  const absl::Status no_such_host = PrepareCommunicator({.rank = 0, .size = 2, .host = "192.0.2.1"}).status();
  EXPECT_EQ(no_such_host.code(), absl::StatusCode::kUnavailable) << no_such_host;
}

TEST(Failure, EndpointsOfAnotherGroup) {
  auto pending = PrepareAll(2, seconds(1));
  const std::string a = pending[0]->endpoint(), b = pending[1]->endpoint();
  const std::vector<std::vector<std::string>> wrong = {
      {}, {a}, {a, b, b}, {b, a}, {a, a}, {a, ""}, {a, "solo"}, {a, b.substr(0, b.size() - 1)}, {a, b + "x"}};
  for (const auto& endpoints : wrong) {
    auto fresh = PrepareAll(2, seconds(1));
    std::vector<std::string> mine = endpoints;
    for (std::string& e : mine) {
      if (e == a) e = fresh[0]->endpoint();
      if (e == b) e = fresh[1]->endpoint();
    }
    EXPECT_EQ(fresh[0]->Connect(mine).status().code(), absl::StatusCode::kInvalidArgument);
  }
  const std::vector<std::string> theirs = {PrepareAll(2, seconds(1))[0]->endpoint(), b};
  EXPECT_EQ(pending[0]->Connect(theirs).status().code(), absl::StatusCode::kInvalidArgument)
      << "not the endpoint rank 0 published";
}

// ---- processes -----------------------------------------------------------------------------------------------------

// Rank 1 of 2 in a child process: exchanges endpoints over a socket pair, reduces `rounds` times, then does as told.
pid_t ForkPeer(int socket, int rounds, bool stop) {
  const pid_t child = fork();
  if (child != 0) return child;
  auto pending = PrepareCommunicator({.rank = 1, .size = 2, .timeout = seconds(30)});
  if (!pending.ok()) _exit(2);
  const std::string mine = (*pending)->endpoint();
  std::string theirs(mine.size(), '\0');  // both have one address
  if (write(socket, mine.data(), mine.size()) != static_cast<ssize_t>(mine.size())) _exit(3);
  if (recv(socket, theirs.data(), theirs.size(), MSG_WAITALL) != static_cast<ssize_t>(theirs.size())) _exit(4);
  auto comm = (*pending)->Connect(std::vector<std::string>{theirs, mine});
  if (!comm.ok()) _exit(5);
  for (int i = 0; i < rounds; ++i) {
    if (!Reduce(**comm).ok()) _exit(6);
  }
  if (stop) raise(SIGSTOP);
  _exit(0);  // without closing anything, as a killed process
}

absl::StatusOr<std::unique_ptr<Communicator>> ConnectToPeer(int socket, milliseconds timeout) {
  auto pending = PrepareCommunicator({.rank = 0, .size = 2, .timeout = timeout});
  if (!pending.ok()) return pending.status();
  const std::string mine = (*pending)->endpoint();
  std::string theirs(mine.size(), '\0');
  EXPECT_EQ(write(socket, mine.data(), mine.size()), static_cast<ssize_t>(mine.size()));
  EXPECT_EQ(recv(socket, theirs.data(), theirs.size(), MSG_WAITALL), static_cast<ssize_t>(theirs.size()));
  return (*pending)->Connect(std::vector<std::string>{mine, theirs});
}

TEST(Processes, DeadPeerIsUnavailableAtOnce) {
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  const pid_t child = ForkPeer(sockets[1], 5, /*stop=*/false);
  const auto comm = ConnectToPeer(sockets[0], seconds(30));
  ASSERT_TRUE(comm.ok()) << comm.status();
  const Clock::time_point start = Clock::now();
  absl::Status status;
  int rounds = 0;
  while ((status = Reduce(**comm)).ok()) ++rounds;
  EXPECT_EQ(rounds, 5);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_LT(Clock::now() - start, seconds(10));
  int exit_status = 0;
  waitpid(child, &exit_status, 0);
  EXPECT_EQ(exit_status, 0);
  close(sockets[0]);
  close(sockets[1]);
}

TEST(Processes, StoppedPeerIsADeadline) {
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  const pid_t child = ForkPeer(sockets[1], 3, /*stop=*/true);
  const auto comm = ConnectToPeer(sockets[0], milliseconds(2000));
  ASSERT_TRUE(comm.ok()) << comm.status();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Reduce(**comm).ok());
  EXPECT_EQ(Reduce(**comm).code(), absl::StatusCode::kDeadlineExceeded);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(sockets[0]);
  close(sockets[1]);
}

}  // namespace
}  // namespace nibble::testing
