#include "router/worker_group.h"

#include <algorithm>
#include <condition_variable>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace nibble {
namespace {

absl::Status FromWorker(const grpc::Status& status, const std::string& address, const char* call) {
  return Annotate(FromGrpcStatus(status), absl::StrCat("worker ", address, ": ", call));
}

std::chrono::system_clock::time_point In(std::chrono::milliseconds timeout) {
  return std::chrono::system_clock::now() + timeout;
}

}  // namespace

WorkerGroup::WorkerGroup(std::vector<std::string> addresses, std::vector<std::shared_ptr<grpc::Channel>> channels)
    : addresses_(std::move(addresses)), channels_(std::move(channels)) {
  for (const auto& channel : channels_) stubs_.push_back(v1::Worker::NewStub(channel));
}

template <typename Request, typename Response>
absl::Status WorkerGroup::CallAll(const char* name, Method<Request, Response> method,
                                  const std::vector<Request>& requests, std::vector<Response>* responses,
                                  std::chrono::milliseconds timeout, bool stop_at_error) {
  const size_t ranks = stubs_.size();
  responses->assign(ranks, {});
  std::vector<grpc::ClientContext> contexts(ranks);
  // Guarded by `mutex` until `pending` is 0; the last callback notifies under it, so nothing here dies too early.
  std::mutex mutex;
  std::condition_variable all_done;
  size_t pending = ranks;
  absl::Status first_error;

  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (interrupted_ && stop_at_error) return absl::CancelledError("the replica is being stopped");
    for (auto& context : contexts) running_.insert(&context);
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    contexts[rank].set_deadline(In(timeout));
    (stubs_[rank]->async()->*method)(&contexts[rank], &requests[rank], &(*responses)[rank], [&, rank](grpc::Status s) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!s.ok() && first_error.ok()) {
        first_error = FromWorker(s, addresses_[rank], name);
        if (stop_at_error) {
          for (auto& context : contexts) context.TryCancel();  // of a finished call: no effect
        }
      }
      if (--pending == 0) all_done.notify_one();
    });
  }
  std::unique_lock<std::mutex> wait_lock(mutex);
  all_done.wait(wait_lock, [&] { return pending == 0; });
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& context : contexts) running_.erase(&context);
  if (interrupted_ && stop_at_error) return absl::CancelledError("the replica is being stopped");
  return first_error;
}

absl::StatusOr<std::vector<v1::WorkerInfo>> WorkerGroup::GetInfo(std::chrono::milliseconds timeout) {
  v1::GetInfoRequest request;
  request.set_protocol_version(v1::PROTOCOL_VERSION_CURRENT);
  std::vector<v1::WorkerInfo> infos;
  NIBBLE_RETURN_IF_ERROR((CallAll<v1::GetInfoRequest, v1::WorkerInfo>(
      "GetInfo", &v1::Worker::StubInterface::async_interface::GetInfo, std::vector(stubs_.size(), request), &infos,
      timeout, true)));
  return infos;
}

absl::StatusOr<std::vector<std::string>> WorkerGroup::Prepare(uint64_t epoch, std::chrono::milliseconds timeout) {
  std::vector<v1::PrepareRequest> requests(stubs_.size());
  for (uint32_t rank = 0; rank < world_size(); ++rank) {
    requests[rank].set_epoch(epoch);
    requests[rank].set_rank(rank);
    requests[rank].set_world_size(world_size());
  }
  std::vector<v1::PrepareResponse> responses;
  NIBBLE_RETURN_IF_ERROR((CallAll<v1::PrepareRequest, v1::PrepareResponse>(
      "Prepare", &v1::Worker::StubInterface::async_interface::Prepare, requests, &responses, timeout, true)));
  std::vector<std::string> endpoints;
  for (auto& response : responses) endpoints.push_back(std::move(*response.mutable_endpoint()));
  return endpoints;
}

absl::StatusOr<GroupCapacity> WorkerGroup::Join(uint64_t epoch, const std::vector<std::string>& endpoints,
                                                uint32_t max_sequences, uint32_t max_step_tokens,
                                                std::chrono::milliseconds timeout) {
  v1::JoinRequest request;
  request.set_epoch(epoch);
  for (const std::string& endpoint : endpoints) request.add_endpoints(endpoint);
  request.set_max_sequences(max_sequences);
  request.set_max_step_tokens(max_step_tokens);
  std::vector<v1::JoinResponse> responses;
  NIBBLE_RETURN_IF_ERROR((CallAll<v1::JoinRequest, v1::JoinResponse>(
      "Join", &v1::Worker::StubInterface::async_interface::Join, std::vector(stubs_.size(), request), &responses,
      timeout, true)));
  GroupCapacity capacity{.num_pages = responses[0].num_pages(), .page_tokens = responses[0].page_tokens()};
  for (size_t rank = 0; rank < responses.size(); ++rank) {
    const v1::JoinResponse& response = responses[rank];
    if (response.num_pages() == 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("worker ", addresses_[rank], ": num_pages is 0, must be more: its KV memory holds no page"));
    }
    capacity.num_pages = std::min(capacity.num_pages, response.num_pages());
    capacity.kv_page_bytes += response.kv_page_bytes();
    if (response.page_tokens() != capacity.page_tokens || response.page_tokens() == 0) {
      return absl::FailedPreconditionError(absl::StrCat("worker ", addresses_[rank], ": page_tokens is ",
                                                        response.page_tokens(), ", must be that of rank 0 (",
                                                        capacity.page_tokens, ") and more than 0"));
    }
  }
  return capacity;
}

void WorkerGroup::Abort(uint64_t epoch, const std::string& reason, std::chrono::milliseconds timeout) {
  v1::AbortRequest request;
  request.set_epoch(epoch);
  request.set_reason(reason);
  std::vector<v1::AbortResponse> responses;
  CallAll<v1::AbortRequest, v1::AbortResponse>("Abort", &v1::Worker::StubInterface::async_interface::Abort,
                                               std::vector(stubs_.size(), request), &responses, timeout, false)
      .IgnoreError();
}

void WorkerGroup::Ping(uint32_t rank, std::chrono::milliseconds timeout,
                       std::function<void(absl::Status, const v1::WorkerInfo&)> done) {
  struct Call {
    grpc::ClientContext context;
    v1::GetInfoRequest request;
    v1::WorkerInfo info;
  };
  auto call = std::make_shared<Call>();
  call->context.set_deadline(In(timeout));
  call->request.set_protocol_version(v1::PROTOCOL_VERSION_CURRENT);
  stubs_[rank]->async()->GetInfo(&call->context, &call->request, &call->info,
                                 [call, address = addresses_[rank], done = std::move(done)](grpc::Status s) {
                                   done(FromWorker(s, address, "GetInfo"), call->info);
                                 });
}

void WorkerGroup::Interrupt() {
  std::lock_guard<std::mutex> lock(mutex_);
  interrupted_ = true;
  for (grpc::ClientContext* context : running_) context->TryCancel();
}

absl::Status ModelAgreement::Check(const std::vector<std::string>& addresses,
                                   const std::vector<v1::WorkerInfo>& infos) {
  std::lock_guard<std::mutex> lock(mutex_);
  ExpectedModel expected = expected_;
  const v1::ModelInfo& first = infos[0].model();
  if (expected.fingerprint.empty()) expected.fingerprint = first.fingerprint();
  if (expected.quantization.empty()) expected.quantization = first.quantization();
  if (expected.vocab_size == 0) expected.vocab_size = first.vocab_size();
  for (size_t rank = 0; rank < infos.size(); ++rank) {
    const v1::WorkerInfo& info = infos[rank];
    const v1::ModelInfo& model = info.model();
    const auto differs = [&](const char* field, const auto& value, const auto& wanted) {
      return absl::FailedPreconditionError(
          absl::StrCat("worker ", addresses[rank], ": ", field, " is '", value, "', must be '", wanted, "'"));
    };
    if (info.protocol_version() != v1::PROTOCOL_VERSION_CURRENT) {
      return differs("protocol_version", info.protocol_version(), static_cast<int>(v1::PROTOCOL_VERSION_CURRENT));
    }
    if (model.fingerprint() != expected.fingerprint) {
      return differs("model.fingerprint", model.fingerprint(), expected.fingerprint);
    }
    if (model.quantization() != expected.quantization) {
      return differs("model.quantization", model.quantization(), expected.quantization);
    }
    if (model.vocab_size() != expected.vocab_size) {
      return differs("model.vocab_size", model.vocab_size(), expected.vocab_size);
    }
    if (info.draining()) return absl::UnavailableError(absl::StrCat("worker ", addresses[rank], ": is draining"));
  }
  expected_ = std::move(expected);
  return absl::OkStatus();
}

}  // namespace nibble
