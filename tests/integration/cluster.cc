#include "tests/integration/cluster.h"

#include <grpcpp/grpcpp.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "common/base/check.h"

namespace nibble::testing {
namespace {

std::string Trim(std::string text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
  return text;
}

// One HTTP/1.0 GET; enough for an exposer on loopback.
std::string HttpGet(const std::string& address, const std::string& path) {
  const size_t colon = address.rfind(':');
  sockaddr_in peer{};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(colon + 1))));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &peer.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  std::string response;
  if (connect(fd, reinterpret_cast<sockaddr*>(&peer), sizeof(peer)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n";
    if (write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
      char buffer[65536];
      for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) response.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return response;
}

}  // namespace

std::string TestModel(const std::string& mode) {
  const std::string path = std::filesystem::path(Binary("")).parent_path().parent_path().string() + "/test-models/" + mode;
  NIBBLE_CHECK(std::filesystem::exists(path + "/config.json"), path + " is made by the ctest fixture test_models");
  return path;
}

Cluster::Cluster(ClusterOptions options) : options_(std::move(options)) {
  static std::atomic<int> counter = 0;
  if (options_.model.empty()) options_.model = TestModel("w4a4kv4");
  dir_ = ScratchDir() + "/cluster-" + std::to_string(counter++);
  std::filesystem::create_directories(dir_);
  const int count = options_.replicas * options_.tensor_parallel;
  workers_.resize(static_cast<size_t>(count));
  worker_addresses_.resize(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) StartWorker(i, "127.0.0.1:0");
  for (int i = 0; i < count; ++i) {
    auto& worker = *workers_[static_cast<size_t>(i)];
    const std::string port = WaitForFile(dir_ + "/worker-" + std::to_string(i) + ".port", worker, std::chrono::seconds(60));
    NIBBLE_CHECK(!port.empty(), worker.Log());
    worker_addresses_[static_cast<size_t>(i)] = "127.0.0.1:" + Trim(port);
  }
  std::vector<std::string> argv = {Binary("nibble-router"), "--model", options_.model, "--listen", "127.0.0.1:0",
                                   "--port-file", dir_ + "/router.port", "--metrics-listen", "127.0.0.1:0",
                                   "--metrics-port-file", dir_ + "/router.metrics"};
  for (int r = 0; r < options_.replicas; ++r) {
    std::string addresses;
    for (int k = 0; k < options_.tensor_parallel; ++k) {
      addresses += (k ? "," : "") + worker_addresses_[static_cast<size_t>(r * options_.tensor_parallel + k)];
    }
    argv.insert(argv.end(), {"--replica", addresses});
  }
  const auto& flags = options_.router_flags;
  if (std::find(flags.begin(), flags.end(), "--step-timeout-ms") == flags.end()) {
    argv.insert(argv.end(), {"--step-timeout-ms", "60000"});  // a busy host or a sanitizer must not look like a hang
  }
  argv.insert(argv.end(), flags.begin(), flags.end());
  router_ = std::make_unique<Process>(argv, dir_ + "/router.log");
  const std::string port = WaitForFile(dir_ + "/router.port", *router_, std::chrono::seconds(60));
  NIBBLE_CHECK(!port.empty(), router_->Log());
  address_ = "127.0.0.1:" + Trim(port);
  metrics_address_ = "127.0.0.1:" + Trim(WaitForFile(dir_ + "/router.metrics", *router_, std::chrono::seconds(10)));
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);
  stub_ = v1::Inference::NewStub(grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments));
  if (options_.wait_ready) {
    NIBBLE_CHECK(WaitReady(options_.replicas, std::chrono::seconds(60)), router_->Log());
  }
}

void Cluster::StartWorker(int index, const std::string& listen) {
  const std::string name = dir_ + "/worker-" + std::to_string(index);
  std::filesystem::remove(name + ".port");
  std::vector<std::string> argv = {Binary("nibble-worker"), "--model", options_.model, "--listen", listen,
                                   "--port-file", name + ".port", "--metrics-listen", "127.0.0.1:0",
                                   "--backend", options_.backend, "--threads", "1",
                                   "--kv-memory", options_.kv_memory};
  argv.insert(argv.end(), options_.worker_flags.begin(), options_.worker_flags.end());
  workers_[static_cast<size_t>(index)] = std::make_unique<Process>(argv, name + ".log");
}

void Cluster::RestartWorker(int replica, int rank) {
  const int index = replica * options_.tensor_parallel + rank;
  StartWorker(index, worker_addresses_[static_cast<size_t>(index)]);
}

v1::GetStatusResponse Cluster::Status() {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  context.set_wait_for_ready(true);
  v1::GetStatusResponse response;
  const auto status = stub_->GetStatus(&context, {}, &response);
  NIBBLE_CHECK(status.ok(), status.error_message());
  return response;
}

bool Cluster::WaitStatus(const std::function<bool(const v1::GetStatusResponse&)>& predicate,
                         std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  do {
    if (predicate(Status())) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

bool Cluster::WaitReady(int ready, std::chrono::milliseconds timeout) {
  return WaitStatus(
      [ready](const v1::GetStatusResponse& status) {
        int count = 0;
        for (const auto& replica : status.replicas()) count += replica.ready() ? 1 : 0;
        return count == ready;
      },
      timeout);
}

std::string Cluster::Metrics() { return HttpGet(metrics_address_, "/metrics"); }

Generation Generate(v1::Inference::Stub& stub, const v1::GenerateRequest& request, std::chrono::milliseconds deadline) {
  Generation result;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + deadline);
  auto reader = stub.Generate(&context, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
    if (result.sequences.size() <= response.index()) result.sequences.resize(response.index() + 1);
    auto& sequence = result.sequences[response.index()];
    NIBBLE_CHECK(!sequence.finished, "message after finish: " + response.ShortDebugString());
    sequence.ids.insert(sequence.ids.end(), response.token_ids().begin(), response.token_ids().end());
    for (const auto& l : response.logprobs()) sequence.logprobs.push_back(l.logprob());
    for (const auto& l : response.prompt_logprobs()) result.prompt_logprobs.push_back(l);
    sequence.text += response.text();
    if (response.has_finish()) {
      sequence.finish = response.finish();
      sequence.finished = true;
    }
  }
  result.status = reader->Finish();
  return result;
}

std::vector<Generation> GenerateAll(Cluster& cluster, const std::vector<v1::GenerateRequest>& requests,
                                    int concurrency) {
  std::vector<Generation> results(requests.size());
  std::atomic<size_t> next = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < concurrency; ++i) {
    clients.emplace_back([&] {
      for (size_t k; (k = next.fetch_add(1)) < requests.size();) results[k] = Generate(cluster.stub(), requests[k]);
    });
  }
  for (auto& client : clients) client.join();
  return results;
}

std::vector<v1::GenerateRequest> VariedRequests(Cluster& cluster, int count, int max_prompt, int max_output,
                                                uint64_t seed) {
  std::ifstream in(SourcePath("deploy/models/text/heldout.txt"), std::ios::binary);
  std::string text(200000, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(text.rfind('\n'));  // not in the middle of a character
  v1::TokenizeRequest tokenize;
  tokenize.set_text(text);
  v1::TokenizeResponse tokens;
  grpc::ClientContext context;
  const auto status = cluster.stub().Tokenize(&context, tokenize, &tokens);
  NIBBLE_CHECK(status.ok(), status.error_message());
  const auto& ids = tokens.input_ids();

  std::mt19937_64 random(seed);
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  std::vector<v1::GenerateRequest> requests;
  for (int i = 0; i < count; ++i) {
    v1::GenerateRequest request;
    request.set_request_id("varied-" + std::to_string(i));
    // A third shares one of four prefixes, so that the prefix cache has something to find.
    auto* input = request.mutable_tokenized();
    const int length = 1 + below(max_prompt);
    const int start = i % 3 == 0 ? (i / 3 % 4) * 2000 : below(ids.size() - max_prompt);
    for (int k = 0; k < length; ++k) input->add_input_ids(ids[start + k]);
    auto* params = request.mutable_sampling_params();
    params->set_max_tokens(static_cast<uint32_t>(1 + below(max_output)));
    params->set_ignore_eos(i % 4 != 0);
    params->set_logprobs(0);
    if (i % 2 == 0) {
      params->set_temperature(0);
    } else {
      params->set_temperature(0.3f + 0.1f * static_cast<float>(below(12)));
      params->set_seed(random());
      if (i % 3 == 1) params->set_top_p(0.8f);
      if (i % 5 == 1) params->set_top_k(static_cast<int>(1 + below(50)));
      if (i % 7 == 1) params->set_min_p(0.05f);
    }
    if (i % 5 == 2) params->set_repetition_penalty(1.2f);
    if (i % 5 == 3) params->set_presence_penalty(0.5f);
    if (i % 5 == 4) params->set_frequency_penalty(0.7f);
    if (i % 11 == 0) params->add_stop(" the");
    if (i % 13 == 0) params->add_stop_token_ids(16);
    if (i % 17 == 0) params->set_min_tokens(1 + params->max_tokens() / 2);
    if (i % 19 == 0) params->set_n(2);
    requests.push_back(std::move(request));
  }
  return requests;
}

}  // namespace nibble::testing
