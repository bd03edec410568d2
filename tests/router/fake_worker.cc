#include "tests/router/fake_worker.h"

#include <grpcpp/server_builder.h>

#include <chrono>

#include "common/base/check.h"

namespace nibble::testing {

FakeWorker::FakeWorker(const FakeWorkerOptions& options) : options_(options) {
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:" + std::to_string(options_.port), grpc::InsecureServerCredentials(), &port_);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  NIBBLE_CHECK(server_ != nullptr, "port " + std::to_string(options_.port));
}

FakeWorker::~FakeWorker() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

void FakeWorker::HangAtStep(uint64_t step) {
  std::lock_guard lock(mutex_);
  hang_at_ = step;
}
void FakeWorker::BreakAtStep(uint64_t step) {
  std::lock_guard lock(mutex_);
  break_at_ = step;
}
void FakeWorker::LieAtStep(uint64_t step) {
  std::lock_guard lock(mutex_);
  lie_at_ = step;
}
void FakeWorker::Drain() {
  std::lock_guard lock(mutex_);
  draining_ = true;
}
void FakeWorker::HoldAfterStep(uint64_t step) {
  std::lock_guard lock(mutex_);
  hold_after_ = step;
}
void FakeWorker::Release() {
  std::lock_guard lock(mutex_);
  hold_after_ = ~uint64_t{0};
  changed_.notify_all();
}

void FakeWorker::WaitForSteps(uint64_t steps) {
  std::unique_lock lock(mutex_);
  const bool came = changed_.wait_for(lock, std::chrono::seconds(120), [&] { return steps_ >= steps; });
  NIBBLE_CHECK(came, "step " + std::to_string(steps) + " never came, the last one was " + std::to_string(steps_));
}
uint64_t FakeWorker::prepares() {
  std::lock_guard lock(mutex_);
  return prepares_;
}
uint64_t FakeWorker::aborts() {
  std::lock_guard lock(mutex_);
  return aborts_;
}
uint64_t FakeWorker::last_epoch() {
  std::lock_guard lock(mutex_);
  return epoch_;
}
uint32_t FakeWorker::live_slots() {
  std::lock_guard lock(mutex_);
  return live_slots_;
}

grpc::Status FakeWorker::GetInfo(grpc::ServerContext*, const v1::GetInfoRequest*, v1::WorkerInfo* info) {
  std::lock_guard lock(mutex_);
  info->set_protocol_version(options_.protocol_version);
  info->set_backend("mock");
  info->set_instance(options_.instance);
  info->set_draining(draining_);
  info->mutable_model()->set_fingerprint(options_.fingerprint);
  info->mutable_model()->set_quantization(options_.quantization);
  info->mutable_model()->set_vocab_size(options_.vocab_size);
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Prepare(grpc::ServerContext*, const v1::PrepareRequest* request,
                                 v1::PrepareResponse* response) {
  std::lock_guard lock(mutex_);
  if (request->epoch() <= epoch_) return {grpc::StatusCode::FAILED_PRECONDITION, "epoch does not grow"};
  epoch_ = request->epoch();
  rank_ = request->rank();
  ++prepares_;
  response->set_endpoint("endpoint-" + std::to_string(rank_));
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Join(grpc::ServerContext*, const v1::JoinRequest* request, v1::JoinResponse* response) {
  std::lock_guard lock(mutex_);
  if (request->epoch() != epoch_) return {grpc::StatusCode::FAILED_PRECONDITION, "not the prepared epoch"};
  if (request->endpoints(static_cast<int>(rank_)) != "endpoint-" + std::to_string(rank_)) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "endpoints are not in rank order"};
  }
  join_ = *request;
  response->set_num_pages(options_.num_pages);
  response->set_page_tokens(options_.page_tokens);
  response->set_kv_page_bytes(1000);
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Execute(grpc::ServerContext* context,
                                 grpc::ServerReaderWriter<v1::StepResult, v1::StepPlan>* stream) {
  ModelWorker::Limits limits{.num_pages = options_.num_pages, .page_tokens = options_.page_tokens};
  uint64_t stream_epoch = 0;
  {
    std::lock_guard lock(mutex_);
    limits.max_sequences = join_.max_sequences();
    limits.max_step_tokens = join_.max_step_tokens();
    steps_ = 0;
    live_slots_ = 0;
    stream_epoch = epoch_;
  }
  ModelWorker worker(limits);
  v1::StepPlan plan;
  while (stream->Read(&plan)) {
    if (plan.step() == 1 && plan.epoch() != stream_epoch) return {grpc::StatusCode::FAILED_PRECONDITION, "wrong epoch"};
    bool lie = false;
    {
      std::unique_lock lock(mutex_);
      // A hung or held step ends when the group is aborted, the process is killed or the router hangs up.
      const auto over = [&] { return stopping_ || aborted_epoch_ == stream_epoch || context->IsCancelled(); };
      while (!over() && (plan.step() == hang_at_ || plan.step() > hold_after_)) {
        changed_.wait_for(lock, std::chrono::milliseconds(20));  // IsCancelled has no notification
      }
      if (over()) return {grpc::StatusCode::CANCELLED, "over"};
      if (plan.step() == break_at_) return {grpc::StatusCode::INTERNAL, "device lost"};
      lie = plan.step() == lie_at_;
    }
    v1::StepResult result;
    if (const absl::Status status = worker.Execute(plan, &result); !status.ok()) {
      return {static_cast<grpc::StatusCode>(status.raw_code()), std::string(status.message())};
    }
    result.set_forward_us(10);
    if (rank_ != 0) {
      result.clear_token_ids();
      result.clear_logprobs();
      result.clear_prompt_logprobs();
    }
    if (lie) result.set_step(result.step() + 7);
    {
      std::lock_guard lock(mutex_);
      live_slots_ = worker.num_live_slots();
    }
    stream->Write(result);
    std::lock_guard lock(mutex_);
    steps_ = plan.step();
    changed_.notify_all();
  }
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Abort(grpc::ServerContext*, const v1::AbortRequest* request, v1::AbortResponse*) {
  std::lock_guard lock(mutex_);
  ++aborts_;
  aborted_epoch_ = request->epoch();
  changed_.notify_all();
  return grpc::Status::OK;
}

}  // namespace nibble::testing
