// Many streams at once, clients that leave, deadlines, full queues: nothing leaks, pages come back.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <thread>

#include "nlohmann/json.hpp"
#include "tests/integration/cluster.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

bool AllFree(const v1::GetStatusResponse& status) {
  for (const auto& r : status.replicas()) {
    if (r.num_requests_running() != 0 || r.num_requests_waiting() != 0 || r.free_pages() != r.total_pages()) return false;
  }
  return true;
}

constexpr int kStreams = kSanitized ? 128 : 1000;

TEST(Load, ThousandConcurrentStreams) {
  Cluster cluster({.router_flags = {"--max-sequences", "256", "--max-waiting-requests", "2000"}});
  const std::string json = ScratchDir() + "/bench.json";
  const auto run = RunBinary({Binary("nibble-bench"), "serve", "--server", cluster.address(), "--num-requests",
                        std::to_string(kStreams), "--input-len", "64", "--output-len", "24", "--request-rate", "inf",
                        "--json", json},
                       seconds(280));
  ASSERT_EQ(run.exit_code, 0) << run.output;
  std::ifstream in(json);
  const auto result = nlohmann::json::parse(in, nullptr, false);
  ASSERT_FALSE(result.is_discarded()) << run.output;
  EXPECT_EQ(result.value("completed", -1), kStreams) << run.output;
  EXPECT_EQ(result.value("failed", -1), 0) << run.output;
  EXPECT_EQ(result.value("total_output_tokens", -1), 24 * kStreams) << run.output;
  EXPECT_TRUE(cluster.WaitStatus(AllFree, seconds(5))) << cluster.Status().DebugString();
}

TEST(Load, CancelledClientsFreeTheirPages) {
  Cluster cluster({});
  auto requests = VariedRequests(cluster, 24, 300, 10, 3);
  std::vector<std::thread> clients;
  for (auto& request : requests) {
    request.mutable_sampling_params()->Clear();
    request.mutable_sampling_params()->set_max_tokens(3000);
    request.mutable_sampling_params()->set_ignore_eos(true);
    clients.emplace_back([&cluster, &request] {
      grpc::ClientContext context;
      auto reader = cluster.stub().Generate(&context, request);
      v1::GenerateResponse response;
      for (int i = 0; i < 5; ++i) ASSERT_TRUE(reader->Read(&response));
      context.TryCancel();
      while (reader->Read(&response)) {
      }
      EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    });
  }
  for (auto& client : clients) client.join();
  // One step, plus the time the cancellations need to travel.
  EXPECT_TRUE(cluster.WaitStatus(AllFree, milliseconds(500))) << cluster.Status().DebugString();
}

TEST(Load, DeadlineEndsARequestAtTheNextStep) {
  Cluster cluster({});
  v1::GenerateRequest request;
  request.set_text("It was a dark and stormy night");
  request.mutable_sampling_params()->set_max_tokens(4000);
  request.mutable_sampling_params()->set_ignore_eos(true);
  const auto g = Generate(cluster.stub(), request, milliseconds(300));
  EXPECT_EQ(g.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << g.status.error_message();
  EXPECT_TRUE(cluster.WaitStatus(AllFree, milliseconds(500))) << cluster.Status().DebugString();
}

TEST(Load, FullQueueIsResourceExhaustedWithNumbers) {
  Cluster cluster({.router_flags = {"--max-sequences", "2", "--max-waiting-requests", "4"}});
  std::vector<v1::GenerateRequest> requests(40);
  for (auto& request : requests) {
    request.set_text("The house stood");
    request.mutable_sampling_params()->set_max_tokens(200);
    request.mutable_sampling_params()->set_ignore_eos(true);
  }
  const auto generations = GenerateAll(cluster, requests, 40);
  int refused = 0, served = 0;
  for (const auto& g : generations) {
    if (g.status.ok()) {
      ++served;
      continue;
    }
    ++refused;
    EXPECT_EQ(g.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << g.status.error_message();
    EXPECT_NE(g.status.error_message().find('4'), std::string::npos) << g.status.error_message();
    EXPECT_FALSE(g.status.error_details().empty());
  }
  EXPECT_GE(served, 6);
  EXPECT_GT(refused, 0);
}

// A client that never reads must cost neither memory nor anybody else's tokens.
TEST(Load, SlowReaderDisturbsNobody) {
  Cluster cluster({});
  v1::GenerateRequest slow;
  slow.set_text("The sea");
  slow.mutable_sampling_params()->set_max_tokens(3500);
  slow.mutable_sampling_params()->set_ignore_eos(true);
  slow.mutable_sampling_params()->set_logprobs(20);
  grpc::ClientContext context;
  auto reader = cluster.stub().Generate(&context, slow);
  const auto requests = VariedRequests(cluster, 16, 100, 40, 5);
  for (const auto& g : GenerateAll(cluster, requests, 8)) EXPECT_TRUE(g.status.ok()) << g.status.error_message();
  context.TryCancel();
  reader->Finish();
  EXPECT_TRUE(cluster.WaitStatus(AllFree, seconds(2))) << cluster.Status().DebugString();
}

TEST(Load, RouterDrainsOnSigterm) {
  Cluster cluster({});
  v1::GenerateRequest request;
  request.set_text("Once");
  request.mutable_sampling_params()->set_max_tokens(400);
  request.mutable_sampling_params()->set_ignore_eos(true);
  Generation running;
  std::thread client([&] { running = Generate(cluster.stub(), request); });
  ASSERT_TRUE(cluster.WaitStatus([](const auto& s) { return s.replicas(0).num_requests_running() == 1; }, seconds(5)));
  cluster.router().Signal(SIGTERM);
  client.join();
  EXPECT_TRUE(running.status.ok()) << running.status.error_message();
  const auto status = cluster.router().Wait(seconds(10));
  ASSERT_TRUE(status.has_value()) << "router still runs 10 s after its last request\n" << cluster.router().Log();
  EXPECT_TRUE(WIFEXITED(*status) && WEXITSTATUS(*status) == 0) << cluster.router().Log();
}

TEST(Load, WorkerDrainsOnSigterm) {
  Cluster cluster({});
  for (int rank = 0; rank < 2; ++rank) {
    cluster.worker(0, rank).Signal(SIGTERM);
    const auto status = cluster.worker(0, rank).Wait(seconds(15));
    ASSERT_TRUE(status.has_value()) << cluster.worker(0, rank).Log();
    EXPECT_TRUE(WIFEXITED(*status) && WEXITSTATUS(*status) == 0) << cluster.worker(0, rank).Log();
  }
}

}  // namespace
}  // namespace nibble::testing
