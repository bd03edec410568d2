#include "worker/service.h"

#include <atomic>
#include <memory>
#include <utility>

#include "common/rpc/status.h"
#include "worker/execute_stream.h"

namespace nibble {
namespace {

grpc::Status Answer(const absl::Status& status) { return ToGrpcStatus(status, Audience::kPeer); }

// A unary call answered later, by another thread. Finishes exactly once, also when the caller gives up first: a call
// that is never finished would keep the server from shutting down.
template <typename Response>
class LaterCall final : public grpc::ServerUnaryReactor {
 public:
  explicit LaterCall(Response* response) : response_(response) {}

  static std::shared_ptr<LaterCall> Make(Response* response) {
    auto call = std::make_shared<LaterCall>(response);
    call->self_ = call;
    return call;
  }

  void Done(absl::StatusOr<Response> result) {
    if (finished_.exchange(true)) return;
    if (result.ok()) *response_ = *std::move(result);
    Finish(Answer(result.status()));
  }

 private:
  void OnCancel() override {
    if (!finished_.exchange(true)) Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the caller gave up"));
  }
  void OnDone() override { self_.reset(); }

  Response* const response_;
  std::atomic<bool> finished_{false};
  std::shared_ptr<LaterCall> self_;  // until OnDone
};

}  // namespace

grpc::ServerUnaryReactor* WorkerService::GetInfo(grpc::CallbackServerContext* context,
                                                 const v1::GetInfoRequest* request, v1::WorkerInfo* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::StatusOr<v1::WorkerInfo> info = membership_->GetInfo(*request);
  if (info.ok()) *response = *std::move(info);
  reactor->Finish(Answer(info.status()));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::Prepare(grpc::CallbackServerContext* context,
                                                 const v1::PrepareRequest* request, v1::PrepareResponse* response) {
  auto call = LaterCall<v1::PrepareResponse>::Make(response);
  membership_->Prepare(*request, [call](absl::StatusOr<v1::PrepareResponse> result) { call->Done(std::move(result)); });
  return call.get();
}

grpc::ServerUnaryReactor* WorkerService::Join(grpc::CallbackServerContext* context, const v1::JoinRequest* request,
                                              v1::JoinResponse* response) {
  auto call = LaterCall<v1::JoinResponse>::Make(response);
  membership_->Join(*request, [call](absl::StatusOr<v1::JoinResponse> result) { call->Done(std::move(result)); });
  return call.get();
}

grpc::ServerUnaryReactor* WorkerService::Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                               v1::AbortResponse* response) {
  membership_->Abort(*request);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerBidiReactor<v1::StepPlan, v1::StepResult>* WorkerService::Execute(grpc::CallbackServerContext* context) {
  return ExecuteStream::Start(membership_);
}

}  // namespace nibble
