#include "tests/tools/fake_inference.h"

#include <chrono>
#include <utility>

#include "common/base/check.h"
#include "common/rpc/status.h"

namespace nibble::testing {
namespace {

// Test texts and tokenized prompts have the same number of "tokens": words or ids.
uint32_t PromptTokens(const v1::GenerateRequest& request) {
  if (request.has_tokenized()) return static_cast<uint32_t>(request.tokenized().input_ids_size());
  return 1;
}

std::string PromptText(const v1::GenerateRequest& request) {
  if (request.has_text()) return request.text();
  if (request.has_chat() && !request.chat().messages().empty()) {
    return request.chat().messages(request.chat().messages_size() - 1).content();
  }
  return "";
}

}  // namespace

class FakeGeneration : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  FakeGeneration(FakeInference* service, const v1::GenerateRequest& request) : service_(service), request_(request) {
    Begin();
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return FinishOnce(grpc::Status::CANCELLED);
    WriteNext();
  }
  void OnCancel() override {
    ++service_->cancelled_calls_;
    if (hang_) FinishOnce(grpc::Status::CANCELLED);
  }
  void OnDone() override { delete this; }

 private:
  void Begin() {
    const std::string prompt = PromptText(request_);
    const int64_t call = ++service_->generate_calls_;
    if (service_->fail_every > 0 && call % service_->fail_every == 0) {
      return Refuse(absl::UnavailableError("no replica is ready"));
    }
    if (prompt == "refuse") {
      return Refuse(InvalidFieldError("sampling_params.max_tokens", "is 0, must be at least 1"));
    }
    if (prompt == "overload") {
      return Refuse(WithRetryAfter(absl::ResourceExhaustedError("the queue is full"), std::chrono::milliseconds(500)));
    }
    hang_ = prompt == "hang";
    cut_ = prompt == "cut";
    escape_ = prompt == "escape";
    tokens_ = hang_ || cut_ ? 3 : request_.sampling_params().max_tokens();
    sequences_ = request_.sampling_params().has_n() ? request_.sampling_params().n() : 1;
    WriteNext();
  }

  void Refuse(const absl::Status& status) { FinishOnce(ToGrpcStatus(status, Audience::kClient)); }

  void FinishOnce(const grpc::Status& status) {
    if (!finished_.exchange(true)) Finish(status);
  }

  void WriteNext() {
    if (token_ == tokens_ && hang_) return;  // OnCancel ends it
    if (token_ == tokens_) return FinishOnce(grpc::Status::OK);
    response_.Clear();
    response_.set_request_id(request_.request_id().empty() ? "fake-1" : request_.request_id());
    response_.set_index(index_);
    response_.set_text(escape_ ? "\x1b[2Jred" : "w" + std::to_string(token_) + " ");
    response_.add_token_ids(100 + token_);
    if (request_.sampling_params().has_logprobs()) {
      v1::TokenLogprobs* entry = response_.add_logprobs();
      entry->set_token_id(100 + token_);
      entry->set_logprob(-0.5f);
      for (uint32_t k = 0; k < request_.sampling_params().logprobs(); ++k) {
        entry->add_top_ids(100 + token_ + k);
        entry->add_top_logprobs(-0.5f - static_cast<float>(k));
      }
    }
    if (token_ + 1 == tokens_ && !hang_ && !cut_) {
      v1::Finish* finish = response_.mutable_finish();
      finish->set_finish_reason(v1::FINISH_REASON_LENGTH);
      finish->mutable_usage()->set_prompt_tokens(PromptTokens(request_));
      finish->mutable_usage()->set_completion_tokens(tokens_);
    }
    // Sequences in turn, as the router's steps interleave them.
    if (++index_ == sequences_) {
      index_ = 0;
      ++token_;
    }
    StartWrite(&response_);
  }

  FakeInference* const service_;
  const v1::GenerateRequest request_;
  v1::GenerateResponse response_;
  uint32_t token_ = 0, tokens_ = 0, index_ = 0, sequences_ = 1;
  bool hang_ = false, cut_ = false, escape_ = false;
  std::atomic<bool> finished_ = false;
};

FakeInference::FakeInference() {
  model.set_model_name("fake");
  model.set_quantization("w4a4kv4");
  model.set_vocab_size(512);
  model.set_max_context_length(4096);
  model.add_eos_token_ids(1);
  model.set_bos_token_id(0);
  model.set_num_layers(4);
  model.set_hidden_size(512);
  model.set_has_chat_template(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  NIBBLE_CHECK(server_ != nullptr);
  address_ = "127.0.0.1:" + std::to_string(port);
}

FakeInference::~FakeInference() { server_->Shutdown(std::chrono::system_clock::now()); }

std::unique_ptr<v1::Inference::Stub> FakeInference::NewStub() const {
  return v1::Inference::NewStub(grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
}

v1::GenerateRequest FakeInference::last_request() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_request_;
}

size_t FakeInference::distinct_prompts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return prompts_.size();
}

size_t FakeInference::connections() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return peers_.size();
}

grpc::ServerWriteReactor<v1::GenerateResponse>* FakeInference::Generate(grpc::CallbackServerContext* context,
                                                                        const v1::GenerateRequest* request) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_request_ = *request;
    ++prompts_[request->tokenized().SerializeAsString()];
    ++peers_[context->peer()];
  }
  return new FakeGeneration(this, *request);
}

grpc::ServerUnaryReactor* FakeInference::GetModelInfo(grpc::CallbackServerContext* context,
                                                      const v1::GetModelInfoRequest* request,
                                                      v1::GetModelInfoResponse* response) {
  *response = model;
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* FakeInference::GetStatus(grpc::CallbackServerContext* context,
                                                   const v1::GetStatusRequest* request,
                                                   v1::GetStatusResponse* response) {
  const bool ready = ++status_calls_ > status_calls_until_ready;
  response->set_version("0.1.0");
  response->set_uptime_seconds(62);
  v1::ReplicaStatus* replica = response->add_replicas();
  replica->set_ready(ready);
  replica->set_state(ready ? "ready" : "loading");
  if (!ready) replica->set_last_error("worker 127.0.0.1:1 refused the connection");
  replica->add_workers("127.0.0.1:50061");
  replica->add_workers("127.0.0.1:50062");
  replica->set_num_requests_running(3);
  replica->set_total_pages(512);
  replica->set_free_pages(392);
  replica->set_cached_pages(40);
  replica->set_steps(1203);
  replica->set_generation_tokens_per_second(512);
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace nibble::testing
