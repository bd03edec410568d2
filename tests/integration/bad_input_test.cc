// Bad input from the network and the command line: a clear error, nobody else disturbed, no crash.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>

#include "tests/integration/cluster.h"

namespace nibble::testing {
namespace {

using std::chrono::seconds;

v1::GenerateRequest Good() {
  v1::GenerateRequest request;
  request.set_text("It was");
  request.mutable_sampling_params()->set_max_tokens(4);
  return request;
}

struct BadField {
  std::string field;   // must be named in the message
  std::function<void(v1::GenerateRequest&)> spoil;
};

class BadInput : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { cluster_ = new Cluster({}); }
  static void TearDownTestSuite() {
    delete cluster_;
    cluster_ = nullptr;
  }
  void TearDown() override {
    const auto g = Generate(cluster_->stub(), Good(), seconds(20));
    EXPECT_TRUE(g.status.ok()) << "the system no longer serves: " << g.status.error_message() << cluster_->router().Log();
  }
  static Cluster* cluster_;
};
Cluster* BadInput::cluster_ = nullptr;

TEST_F(BadInput, EveryFieldIsNamed) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<BadField> cases = {
      {"temperature", [=](auto& r) { r.mutable_sampling_params()->set_temperature(-1); }},
      {"temperature", [=](auto& r) { r.mutable_sampling_params()->set_temperature(nan); }},
      {"temperature", [=](auto& r) { r.mutable_sampling_params()->set_temperature(inf); }},
      {"top_p", [=](auto& r) { r.mutable_sampling_params()->set_top_p(0); }},
      {"top_p", [=](auto& r) { r.mutable_sampling_params()->set_top_p(1.5); }},
      {"top_k", [=](auto& r) { r.mutable_sampling_params()->set_top_k(-2); }},
      {"min_p", [=](auto& r) { r.mutable_sampling_params()->set_min_p(2); }},
      {"frequency_penalty", [=](auto& r) { r.mutable_sampling_params()->set_frequency_penalty(3); }},
      {"presence_penalty", [=](auto& r) { r.mutable_sampling_params()->set_presence_penalty(nan); }},
      {"repetition_penalty", [=](auto& r) { r.mutable_sampling_params()->set_repetition_penalty(0); }},
      {"max_tokens", [=](auto& r) { r.mutable_sampling_params()->set_max_tokens(0); }},
      {"max_tokens", [=](auto& r) { r.mutable_sampling_params()->set_max_tokens(4000000000u); }},
      {"min_tokens", [=](auto& r) { r.mutable_sampling_params()->set_min_tokens(100); }},
      {"stop", [=](auto& r) { r.mutable_sampling_params()->add_stop(""); }},
      {"stop", [=](auto& r) { r.mutable_sampling_params()->add_stop(std::string(1000, 'x')); }},
      {"stop", [=](auto& r) { for (int i = 0; i < 100; ++i) r.mutable_sampling_params()->add_stop("x"); }},
      {"stop_token_ids", [=](auto& r) { r.mutable_sampling_params()->add_stop_token_ids(4000000000u); }},
      {"n", [=](auto& r) { r.mutable_sampling_params()->set_n(0); }},
      {"n", [=](auto& r) { r.mutable_sampling_params()->set_n(4000000000u); }},
      {"logprobs", [=](auto& r) { r.mutable_sampling_params()->set_logprobs(1000); }},
      {"prompt_logprobs", [=](auto& r) { r.mutable_sampling_params()->set_prompt_logprobs(21); }},
      {"logit_bias", [=](auto& r) { (*r.mutable_sampling_params()->mutable_logit_bias())[99999999] = 1; }},
      {"logit_bias", [=](auto& r) { (*r.mutable_sampling_params()->mutable_logit_bias())[1] = nan; }},
      {"priority", [=](auto& r) { r.set_priority(1000); }},
      {"request_id", [=](auto& r) { r.set_request_id("no spaces please"); }},
      {"cache_salt", [=](auto& r) { r.set_cache_salt(std::string(1000, 's')); }},
      {"input", [=](auto& r) { r.clear_text(); }},
      {"input_ids", [=](auto& r) { r.mutable_tokenized()->add_input_ids(4096); }},
      {"input_ids", [=](auto& r) { r.mutable_tokenized()->add_input_ids(4294967295u); }},
      {"input_ids", [=](auto& r) { r.mutable_tokenized(); }},
      {"messages", [=](auto& r) { r.mutable_chat(); }},
      {"role", [=](auto& r) { r.mutable_chat()->add_messages()->set_role("wizard"); }},
  };
  for (const auto& c : cases) {
    auto request = Good();
    c.spoil(request);
    const auto g = Generate(cluster_->stub(), request, seconds(20));
    EXPECT_EQ(g.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << c.field << ": " << g.status.error_message();
    EXPECT_NE(g.status.error_message().find(c.field), std::string::npos) << c.field << ": " << g.status.error_message();
  }
}

TEST_F(BadInput, PromptBeyondTheContextNamesBothLengths) {
  auto request = Good();
  for (int i = 0; i < 5000; ++i) request.mutable_tokenized()->add_input_ids(100);
  const auto g = Generate(cluster_->stub(), request, seconds(20));
  EXPECT_EQ(g.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(g.status.error_message().find("5000"), std::string::npos) << g.status.error_message();
  EXPECT_NE(g.status.error_message().find("4096"), std::string::npos) << g.status.error_message();
}

TEST_F(BadInput, HugePromptIsRefusedQuickly) {
  auto request = Good();
  request.set_text(std::string(64 << 20, 'a'));
  const auto start = std::chrono::steady_clock::now();
  const auto g = Generate(cluster_->stub(), request, seconds(60));
  EXPECT_FALSE(g.status.ok());
  EXPECT_TRUE(g.status.error_code() == grpc::StatusCode::INVALID_ARGUMENT ||
              g.status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) << g.status.error_code() << g.status.error_message();
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(10));
}

// A message protobuf would never build: field 2 (text) with bytes that are not UTF-8, and plain garbage.
TEST_F(BadInput, RawBytesThatAreNoRequest) {
  auto channel = grpc::CreateChannel(cluster_->address(), grpc::InsecureChannelCredentials());
  const std::vector<std::string> bodies = {std::string("\x12\x03\xff\xfe\xfd", 5), std::string(1000, '\xff'),
                                           std::string("\x12\xff\xff\xff\xff\x0f", 6)};
  for (const auto& body : bodies) {
    grpc::GenericStub stub(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(10));
    grpc::CompletionQueue queue;
    grpc::Slice slice(body);
    grpc::ByteBuffer buffer(&slice, 1), response;
    auto call = stub.PrepareUnaryCall(&context, "/nibble.v1.Inference/Generate", buffer, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&response, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    ASSERT_TRUE(queue.Next(&tag, &ok));
    EXPECT_FALSE(status.ok());
    EXPECT_NE(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
  }
}

TEST_F(BadInput, DetokenizeUnknownId) {
  v1::DetokenizeRequest request;
  request.add_input_ids(4294967295u);
  v1::DetokenizeResponse response;
  grpc::ClientContext context;
  const auto status = cluster_->stub().Detokenize(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
  EXPECT_NE(status.error_message().find("4294967295"), std::string::npos) << status.error_message();
}

TEST_F(BadInput, PortInUse) {
  const auto router = RunBinary({Binary("nibble-router"), "--model", TestModel("w4a4kv4"), "--listen", cluster_->address(),
                           "--replica", "127.0.0.1:1,127.0.0.1:2"}, seconds(20));
  EXPECT_EQ(router.exit_code, 1) << router.output;
  EXPECT_NE(router.output.find(cluster_->address()), std::string::npos) << router.output;
  const auto worker = RunBinary({Binary("nibble-worker"), "--model", TestModel("w4a4kv4"), "--listen", cluster_->address()}, seconds(20));
  EXPECT_EQ(worker.exit_code, 1) << worker.output;
  EXPECT_NE(worker.output.find(cluster_->address()), std::string::npos) << worker.output;
}

TEST_F(BadInput, AllConfigProblemsAtOnce) {
  const auto run = RunBinary({Binary("nibble-router"), "--model", "/nonexistent", "--listen", "nonsense", "--max-sequences", "0",
                        "--replica", ""}, seconds(20));
  EXPECT_EQ(run.exit_code, 2) << run.output;
  for (const char* field : {"model", "listen", "max-sequences", "replica"}) {
    EXPECT_NE(run.output.find(field), std::string::npos) << field << " missing in: " << run.output;
  }
}

// Damaged model directories: refused by worker, eval and quantizer with file and reason, and no partial output.
TEST_F(BadInput, DamagedCheckpoints) {
  namespace fs = std::filesystem;
  const std::string model = SourcePath("deploy/models/novelist-17m");
  auto copy = [&](const std::string& name) {
    const std::string to = ScratchDir() + "/damaged-" + name;
    fs::copy(model, to, fs::copy_options::recursive | fs::copy_options::overwrite_existing);
    return to;
  };
  std::vector<std::pair<std::string, std::string>> damaged;   // directory, word that must be in the error
  auto d = copy("truncated");
  fs::resize_file(d + "/model.safetensors", 1000000);
  damaged.emplace_back(d, "model.safetensors");
  d = copy("header");
  {
    std::fstream f(d + "/model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    const uint64_t huge = ~uint64_t{0} >> 1;
    f.write(reinterpret_cast<const char*>(&huge), sizeof(huge));
  }
  damaged.emplace_back(d, "header");
  d = copy("config");
  std::ofstream(d + "/config.json") << "{\"model_type\": \"llama\", \"hidden_size\": -1}";
  damaged.emplace_back(d, "config.json");
  d = copy("missing");
  fs::remove(d + "/model.safetensors");
  damaged.emplace_back(d, "safetensors");
  for (const auto& [dir, word] : damaged) {
    const std::string output = dir + "-out";
    const auto quantize = RunBinary({Binary("nibble-quantize"), "--model", dir, "--output", output, "--mode", "w4a8kv4",
                               "--calibration", SourcePath("deploy/models/text/calibration.txt")}, seconds(60));
    EXPECT_NE(quantize.exit_code, 0) << dir;
    EXPECT_LT(quantize.exit_code, 126) << dir << ": crashed: " << quantize.output;
    EXPECT_NE(quantize.output.find(word), std::string::npos) << quantize.output;
    EXPECT_FALSE(fs::exists(output)) << "a partial output was left behind";
    const auto worker = RunBinary({Binary("nibble-worker"), "--model", dir, "--listen", "127.0.0.1:0"}, seconds(20));
    EXPECT_TRUE(worker.exit_code == 1 || worker.exit_code == 2) << dir << ": " << worker.exit_code << worker.output;
    EXPECT_NE(worker.output.find(word), std::string::npos) << worker.output;
  }
}

}  // namespace
}  // namespace nibble::testing
