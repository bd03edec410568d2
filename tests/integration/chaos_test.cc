// Workers die, hang and come back under load.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <thread>

#include "common/rpc/status.h"
#include "tests/integration/cluster.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using SteadyClock = std::chrono::steady_clock;

std::vector<v1::GenerateRequest> LongRequests(Cluster& cluster, int count) {
  auto requests = VariedRequests(cluster, count, 200, 160, 99);
  for (auto& request : requests) {
    request.mutable_sampling_params()->set_max_tokens(160);
    request.mutable_sampling_params()->set_ignore_eos(true);
    request.mutable_sampling_params()->clear_stop();
    request.mutable_sampling_params()->clear_stop_token_ids();
  }
  return requests;
}

TEST(Chaos, KilledWorkerWithTwoReplicasFailsNobody) {
  std::vector<v1::GenerateRequest> requests;
  std::vector<Generation> undisturbed;
  {
    Cluster calm({});
    requests = LongRequests(calm, kSanitized ? 16 : 64);
    undisturbed = GenerateAll(calm, requests, 32);
  }
  Cluster cluster({.replicas = 2});
  std::vector<Generation> generations;
  std::jthread load([&] { generations = GenerateAll(cluster, requests, 32); });
  // Kill in the middle of the work, twice: first one replica, then, when it is back, the other.
  ASSERT_TRUE(cluster.WaitStatus([](const auto& s) { return s.replicas(0).steps() > 40; }, seconds(30 * kSlowdown)));
  cluster.worker(0, 1).Signal(SIGKILL);
  const auto killed = SteadyClock::now();
  ASSERT_TRUE(cluster.WaitStatus([](const auto& s) { return !s.replicas(0).ready(); }, seconds(10 * kSlowdown)));
  EXPECT_LT(SteadyClock::now() - killed, seconds(2 * kSlowdown)) << "its replica must go unready within 2 s";
  cluster.RestartWorker(0, 1);
  EXPECT_TRUE(cluster.WaitReady(2, seconds(5 * kSlowdown))) << "a restarted worker rejoins by itself within 5 s\n"
                                                << cluster.router().Log();
  cluster.worker(1, 0).Signal(SIGKILL);
  load.join();
  uint32_t replayed = 0;
  for (size_t i = 0; i < generations.size(); ++i) {
    ASSERT_TRUE(generations[i].status.ok()) << i << ": " << generations[i].status.error_message();
    ASSERT_EQ(generations[i].sequences.size(), undisturbed[i].sequences.size());
    for (size_t s = 0; s < generations[i].sequences.size(); ++s) {
      EXPECT_EQ(generations[i].sequences[s].ids, undisturbed[i].sequences[s].ids) << "request " << i;
      EXPECT_EQ(generations[i].sequences[s].text, undisturbed[i].sequences[s].text) << "request " << i;
      replayed += generations[i].sequences[s].finish.usage().preemptions();
    }
  }
  EXPECT_GT(replayed, 0u) << "nobody was running on the killed replica: the test showed nothing";
}

TEST(Chaos, KilledWorkerWithOneReplicaIsAClearErrorAndServiceComesBack) {
  Cluster cluster({});
  const auto requests = LongRequests(cluster, 16);
  std::vector<Generation> generations(requests.size());
  std::atomic<int64_t> last_end_ms = 0;
  std::vector<std::thread> clients;
  const auto start = SteadyClock::now();
  for (size_t i = 0; i < requests.size(); ++i) {
    clients.emplace_back([&, i] {
      generations[i] = Generate(cluster.stub(), requests[i]);
      const int64_t now = std::chrono::duration_cast<milliseconds>(SteadyClock::now() - start).count();
      int64_t seen = last_end_ms;
      while (seen < now && !last_end_ms.compare_exchange_weak(seen, now)) {
      }
    });
  }
  ASSERT_TRUE(cluster.WaitStatus([](const auto& s) { return s.replicas(0).steps() > 10; }, seconds(30 * kSlowdown)));
  cluster.worker(0, 0).Signal(SIGKILL);
  const int64_t killed_ms = std::chrono::duration_cast<milliseconds>(SteadyClock::now() - start).count();
  for (auto& client : clients) client.join();
  EXPECT_LT(last_end_ms - killed_ms, 2000 * kSlowdown);
  int failed = 0;
  for (const auto& g : generations) {
    if (g.status.ok()) continue;
    ++failed;
    EXPECT_EQ(g.status.error_code(), grpc::StatusCode::UNAVAILABLE) << g.status.error_message();
    EXPECT_FALSE(g.status.error_details().empty()) << "google.rpc.RetryInfo is missing";
  }
  EXPECT_GT(failed, 0);
  // New requests are refused at once, not queued for ever.
  const auto refused = Generate(cluster.stub(), requests[0], seconds(5 * kSlowdown));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE) << refused.status.error_message();
  const auto restarted = SteadyClock::now();
  cluster.RestartWorker(0, 0);
  ASSERT_TRUE(cluster.WaitReady(1, seconds(20 * kSlowdown))) << cluster.router().Log();
  EXPECT_LT(SteadyClock::now() - restarted, seconds(5 * kSlowdown));
  const auto again = Generate(cluster.stub(), requests[0]);
  EXPECT_TRUE(again.status.ok()) << again.status.error_message();
}

TEST(Chaos, HungWorkerIsNoticedByTheStepDeadline) {
  Cluster cluster({.replicas = 2, .router_flags = {"--step-timeout-ms", std::to_string(1500 * kSlowdown)}});
  const auto requests = LongRequests(cluster, 32);
  std::vector<Generation> generations;
  std::jthread load([&] { generations = GenerateAll(cluster, requests, 16); });
  ASSERT_TRUE(cluster.WaitStatus([](const auto& s) { return s.replicas(1).steps() > 20; }, seconds(30 * kSlowdown)));
  cluster.worker(1, 1).Signal(SIGSTOP);
  EXPECT_TRUE(cluster.WaitStatus([](const auto& s) { return !s.replicas(1).ready(); }, seconds(10 * kSlowdown)));
  load.join();
  for (const auto& g : generations) EXPECT_TRUE(g.status.ok()) << g.status.error_message();
  cluster.worker(1, 1).Signal(SIGCONT);
  EXPECT_TRUE(cluster.WaitReady(2, seconds(15 * kSlowdown))) << cluster.router().Log();
}

}  // namespace
}  // namespace nibble::testing
