#include "router/router.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/model/checkpoint.h"
#include "common/model/config.h"
#include "common/rpc/channel.h"
#include "common/rpc/status.h"

namespace nibble {
namespace {

constexpr char kInference[] = "nibble.v1.Inference";
constexpr char kLiveness[] = "liveness";   // for probes that must not restart a router whose workers are still loading

// A prompt of the model's context, as ids (5 bytes at most) or as text, and room for everything else in a request.
int MaxReceiveBytes(int64_t max_context_length) {
  return static_cast<int>(std::min<int64_t>((4 << 20) + 64 * max_context_length, 256 << 20));
}

ReplicaOptions MakeReplicaOptions(const RouterConfig& c) {
  using std::chrono::milliseconds, std::chrono::seconds;
  ReplicaOptions options;
  options.scheduler.max_sequences = c.max_sequences;
  options.scheduler.max_step_tokens = c.max_step_tokens;
  options.scheduler.max_prefill_chunk = c.max_prefill_chunk;
  options.scheduler.max_steps_in_flight = c.run_ahead ? 2 : 1;
  options.scheduler.prefix_cache = c.prefix_cache;
  options.inbox_messages = c.max_waiting_requests + 2 * c.max_sequences + 1024;
  options.load_timeout = seconds(c.load_timeout_s);
  options.join_timeout = seconds(c.join_timeout_s);
  options.step_timeout = milliseconds(c.step_timeout_ms);
  options.ping_interval = milliseconds(c.ping_interval_ms);
  return options;
}

// The checkpoint's fingerprint when this machine has the tensors; a router may well run without them.
absl::StatusOr<std::string> Fingerprint(const std::string& dir) {
  const auto path = std::filesystem::path(dir);
  std::error_code ignored;
  if (!std::filesystem::exists(path / "model.safetensors", ignored) &&
      !std::filesystem::exists(path / "model.safetensors.index.json", ignored)) {
    LogInfo("no tensors in the model directory: the first replica decides which checkpoint is served");
    return std::string();
  }
  NIBBLE_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(dir));
  return checkpoint->Fingerprint();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Router>> Router::Start(const RouterConfig& config) {
  NIBBLE_ASSIGN_OR_RETURN(const ModelConfig model, LoadModelConfig(config.model_dir));
  NIBBLE_ASSIGN_OR_RETURN(const std::string fingerprint, Fingerprint(config.model_dir));
  std::unique_ptr<Router> router(new Router);
  NIBBLE_ASSIGN_OR_RETURN(router->tokenizer_, Tokenizer::Load(config.model_dir));
  const Tokenizer* tokenizer = router->tokenizer_.get();
  if (tokenizer->vocab_size() > model.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(config.model_dir, ": tokenizer.json has ", tokenizer->vocab_size(),
                                                   " tokens, config.json's vocab_size is ", model.vocab_size));
  }

  std::optional<ChatTemplate> chat;
  if (auto made = ChatTemplate::Llama3(tokenizer); made.ok()) {
    chat = *std::move(made);
  } else {
    LogInfo("no chat template reason=\"{}\"", std::string(made.status().message()));
  }
  const auto vocab_size = static_cast<uint32_t>(model.vocab_size);
  const auto max_context_length = static_cast<uint32_t>(model.max_position_embeddings);
  const std::vector<uint32_t> eos(model.eos_token_ids.begin(), model.eos_token_ids.end());
  router->intake_ = std::make_unique<Intake>(tokenizer, std::move(chat), vocab_size, max_context_length, eos);

  router->request_metrics_ = std::make_unique<RequestMetrics>(&router->metrics_, model.name);
  router->output_ = std::make_unique<OutputPool>(config.output_threads, router->request_metrics_.get());

  std::vector<Fleet::Workers> workers;
  ChannelOptions channel;
  channel.tls = {.certificate_file = config.worker_tls_cert,
                 .key_file = config.worker_tls_key,
                 .ca_file = config.worker_tls_ca};
  for (const auto& addresses : config.replicas) {
    workers.push_back({.addresses = addresses});
    for (const std::string& address : addresses) {
      NIBBLE_ASSIGN_OR_RETURN(auto opened, CreateChannel(address, channel));
      workers.back().channels.push_back(std::move(opened));
    }
  }
  FleetOptions fleet{.model_name = model.name,
                     .replica = MakeReplicaOptions(config),
                     .max_waiting_requests = config.max_waiting_requests,
                     .max_waiting_tokens = config.max_waiting_tokens,
                     .replay_wait = std::chrono::milliseconds(config.replay_wait_ms)};
  router->fleet_ = std::make_unique<Fleet>(
      fleet, std::move(workers), ExpectedModel{fingerprint, QuantizationName(model.quantization), vocab_size},
      router->output_.get(), &router->metrics_, [r = router.get()](bool ready) { r->SetReady(ready); });

  ServiceOptions service{.tokenizer_threads = config.tokenizer_threads,
                         .max_buffered_tokens = config.max_buffered_tokens,
                         .stall_timeout = std::chrono::seconds(config.slow_client_timeout_s)};
  v1::GetModelInfoResponse& info = service.model_info;
  info.set_model_name(model.name);
  info.set_quantization(QuantizationName(model.quantization));
  info.set_vocab_size(vocab_size);
  info.set_max_context_length(max_context_length);
  info.mutable_eos_token_ids()->Add(eos.begin(), eos.end());
  if (model.bos_token_id.has_value()) info.set_bos_token_id(static_cast<uint32_t>(*model.bos_token_id));
  info.set_num_layers(static_cast<uint32_t>(model.num_layers));
  info.set_hidden_size(static_cast<uint32_t>(model.hidden_size));
  info.set_has_chat_template(router->intake_->has_chat_template());
  router->service_ = std::make_unique<InferenceService>(service, tokenizer, router->intake_.get(),
                                                        router->fleet_.get(), router->output_.get(),
                                                        router->request_metrics_.get());

  if (!config.metrics_listen.empty()) {
    NIBBLE_ASSIGN_OR_RETURN(router->metrics_server_, MetricsServer::Start(config.metrics_listen, router->metrics_));
  }
  RpcServerOptions server{.listen = config.listen,
                          .tls = {.certificate_file = config.tls_cert,
                                  .key_file = config.tls_key,
                                  .ca_file = config.tls_client_ca},
                          .max_receive_message_bytes = MaxReceiveBytes(model.max_position_embeddings)};
  const std::array<grpc::Service*, 1> services = {router->service_.get()};
  NIBBLE_ASSIGN_OR_RETURN(router->server_, RpcServer::Start(server, services));
  router->server_->SetServing(kLiveness, true);
  router->SetReady(false);
  router->fleet_->Start();
  return router;
}

Router::~Router() { Stop(std::chrono::milliseconds(0)); }

std::optional<HostPort> Router::metrics_address() const {
  if (metrics_server_ == nullptr) return std::nullopt;
  return metrics_server_->address();
}

void Router::SetReady(bool ready) {
  std::lock_guard<std::mutex> lock(serving_mutex_);
  if (server_ == nullptr) return;
  for (const char* name : {"", kInference}) server_->SetServing(name, ready && !draining_);
}

void Router::Stop(std::chrono::milliseconds grace) {
  if (server_ != nullptr) {
    {
      std::lock_guard<std::mutex> lock(serving_mutex_);
      if (draining_) return;
      draining_ = true;
    }
    SetReady(false);
    service_->Drain();
    if (grace.count() > 0 && !service_->WaitIdle(grace)) {
      LogWarn("drain timed out grace_ms={}", grace.count());
    }
    service_->FailAll(WithRetryAfter(absl::UnavailableError("the router is stopping"), std::chrono::milliseconds(1000)));
  }
  if (fleet_ != nullptr) fleet_->Stop();
  // What does not read even now is cut off.
  if (server_ != nullptr) server_->Shutdown(std::chrono::milliseconds(1000));
  service_.reset();
  fleet_.reset();
  output_.reset();
}

}  // namespace nibble
