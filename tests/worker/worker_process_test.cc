// nibble-worker as a process: start, port file, exit statuses, signals.
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <memory>
#include <string>

#include "common/rpc/channel.h"
#include "common/rpc/status.h"
#include "nibble/v1/worker.grpc.pb.h"
#include "tests/integration/process.h"

namespace nibble {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::Process;

std::vector<std::string> Command(std::vector<std::string> more) {
  std::vector<std::string> argv = {testing::Binary("nibble-worker"),
                                   "--model",
                                   testing::SourcePath("deploy/models/novelist-17m"),
                                   "--kv-memory",
                                   "16MiB",
                                   "--threads",
                                   "1"};
  argv.insert(argv.end(), more.begin(), more.end());
  return argv;
}

struct Worker {
  Worker(const std::string& name, std::vector<std::string> more) {
    const std::string port_file = testing::ScratchDir() + "/" + name + ".port";
    more.insert(more.end(), {"--listen", "127.0.0.1:0", "--port-file", port_file});
    process = std::make_unique<Process>(Command(more), testing::ScratchDir() + "/" + name + ".log");
    const std::string port = testing::WaitForFile(port_file, *process, seconds(60));
    EXPECT_FALSE(port.empty()) << process->Log();
    address = "127.0.0.1:" + std::to_string(std::atoi(port.c_str()));
    stub = v1::Worker::NewStub(*CreateChannel(address));
  }
  std::unique_ptr<Process> process;
  std::string address;
  std::unique_ptr<v1::Worker::Stub> stub;
};

template <typename Request, typename Response>
absl::Status Call(v1::Worker::Stub& stub,
                  grpc::Status (v1::Worker::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                  const Request& request, Response* response) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + seconds(60));
  return FromGrpcStatus((stub.*method)(&context, request, response));
}

void FormSolo(Worker& worker) {
  v1::PrepareRequest prepare;
  prepare.set_epoch(1);
  prepare.set_world_size(1);
  v1::PrepareResponse prepared;
  ASSERT_EQ(Call(*worker.stub, &v1::Worker::Stub::Prepare, prepare, &prepared), absl::OkStatus())
      << worker.process->Log();
  v1::JoinRequest join;
  join.set_epoch(1);
  join.add_endpoints(prepared.endpoint());
  join.set_max_sequences(4);
  join.set_max_step_tokens(64);
  v1::JoinResponse joined;
  ASSERT_EQ(Call(*worker.stub, &v1::Worker::Stub::Join, join, &joined), absl::OkStatus()) << worker.process->Log();
  EXPECT_GT(joined.num_pages(), 0u);
}

v1::StepPlan FirstPlan() {
  v1::StepPlan plan;
  plan.set_epoch(1);
  plan.set_step(1);
  auto* start = plan.add_start();
  for (uint32_t id = 100; id < 108; ++id) start->add_token_ids(id);
  start->set_num_prompt_tokens(8);
  start->add_page_ids(0);
  start->mutable_sampling()->set_top_p(1);
  start->mutable_sampling()->set_repetition_penalty(1);
  auto* chunk = plan.add_prefill();
  chunk->set_num_tokens(8);
  chunk->set_sample(true);
  return plan;
}

TEST(WorkerProcess, ServesTheModelAndLeavesOnSigterm) {
  Worker worker("life", {});
  v1::GetInfoRequest request;
  request.set_protocol_version(v1::PROTOCOL_VERSION_CURRENT);
  v1::WorkerInfo info;
  ASSERT_EQ(Call(*worker.stub, &v1::Worker::Stub::GetInfo, request, &info), absl::OkStatus());
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_EQ(info.model().name(), "novelist-17m");
  EXPECT_FALSE(info.model().fingerprint().empty());
  FormSolo(worker);
  {
    grpc::ClientContext context;
    auto stream = worker.stub->Execute(&context);
    ASSERT_TRUE(stream->Write(FirstPlan()));
    v1::StepResult result;
    ASSERT_TRUE(stream->Read(&result));
    EXPECT_EQ(result.token_ids_size(), 1);
    stream->WritesDone();
    EXPECT_TRUE(stream->Finish().ok());
  }
  worker.process->Signal(SIGTERM);
  const auto status = worker.process->Wait(seconds(20));
  ASSERT_TRUE(status.has_value()) << worker.process->Log();
  EXPECT_TRUE(WIFEXITED(*status) && WEXITSTATUS(*status) == 0) << *status << worker.process->Log();
}

TEST(WorkerProcess, ASecondSignalCutsTheDrainShort) {
  Worker worker("impatient", {"--drain-timeout-s", "600"});
  FormSolo(worker);
  grpc::ClientContext context;
  auto stream = worker.stub->Execute(&context);
  ASSERT_TRUE(stream->Write(FirstPlan()));
  v1::StepResult result;
  ASSERT_TRUE(stream->Read(&result));
  worker.process->Signal(SIGTERM);
  v1::GetInfoRequest request;
  request.set_protocol_version(v1::PROTOCOL_VERSION_CURRENT);
  v1::WorkerInfo info;
  const auto deadline = std::chrono::steady_clock::now() + seconds(20);
  while (!info.draining() && std::chrono::steady_clock::now() < deadline) {
    ASSERT_EQ(Call(*worker.stub, &v1::Worker::Stub::GetInfo, request, &info), absl::OkStatus());
  }
  ASSERT_TRUE(info.draining());
  EXPECT_TRUE(worker.process->Running()) << "a sequence is alive";
  worker.process->Signal(SIGINT);
  const auto status = worker.process->Wait(seconds(20));
  ASSERT_TRUE(status.has_value());
  EXPECT_TRUE(WIFEXITED(*status) && WEXITSTATUS(*status) == 128 + SIGINT) << *status;
}

TEST(WorkerProcess, TakenPortsAreNamed) {
  Worker worker("first", {});
  const auto second = testing::RunBinary(Command({"--listen", worker.address}), seconds(30));
  EXPECT_EQ(second.exit_code, 1) << second.output;
  EXPECT_NE(second.output.find("cannot listen on " + worker.address + ": Address already in use"), std::string::npos)
      << second.output;
  const auto metrics =
      testing::RunBinary(Command({"--listen", "127.0.0.1:0", "--metrics-listen", worker.address}), seconds(30));
  EXPECT_EQ(metrics.exit_code, 1) << metrics.output;
  EXPECT_NE(metrics.output.find("metrics: cannot listen on " + worker.address), std::string::npos) << metrics.output;
}

TEST(WorkerProcess, CannotWriteItsPortFile) {
  const auto run = testing::RunBinary(Command({"--listen", "127.0.0.1:0", "--port-file", "/nonexistent/port"}), seconds(30));
  EXPECT_EQ(run.exit_code, 1) << run.output;
  EXPECT_NE(run.output.find("/nonexistent/port"), std::string::npos) << run.output;
}

TEST(WorkerProcess, WrongConfigurationIsStatusTwo) {
  const auto run =
      testing::RunBinary({testing::Binary("nibble-worker"), "--model", "/nonexistent", "--threads", "-1"}, seconds(30));
  EXPECT_EQ(run.exit_code, 2) << run.output;
  EXPECT_NE(run.output.find("model is '/nonexistent', must be a directory"), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("threads is '-1', must be a whole number from 0 to 1024"), std::string::npos) << run.output;
}

TEST(WorkerProcess, AMissingBackendIsStatusOne) {
  const auto run =
      testing::RunBinary(Command({"--listen", "127.0.0.1:0", "--backend", "cuda", "--device", "1000"}), seconds(30));
  EXPECT_EQ(run.exit_code, 1) << run.output;
  EXPECT_NE(run.output.find("backend cuda"), std::string::npos) << run.output;
}

TEST(WorkerProcess, TheMockNeedsNoWeights) {
  const std::string dir = testing::ScratchDir() + "/config_only";
  ASSERT_EQ(std::system(("mkdir -p " + dir + " && cp " + testing::SourcePath("deploy/models/novelist-17m/config.json") +
                         " " + dir)
                            .c_str()),
            0);
  const std::string port_file = testing::ScratchDir() + "/mock.port";
  Process process({testing::Binary("nibble-worker"), "--model", dir, "--backend", "mock", "--listen", "127.0.0.1:0",
                   "--port-file", port_file},
                  testing::ScratchDir() + "/mock.log");
  EXPECT_FALSE(testing::WaitForFile(port_file, process, seconds(30)).empty()) << process.Log();
  process.Signal(SIGTERM);
  const auto status = process.Wait(seconds(20));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(*status, 0) << process.Log();
}

}  // namespace
}  // namespace nibble
