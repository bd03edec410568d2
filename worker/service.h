// worker.proto on the gRPC callback API. No logic: every call is one call of Membership or Group.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "nibble/v1/worker.grpc.pb.h"
#include "worker/membership.h"

namespace nibble {

// For grpc.health.v1.
inline constexpr char kWorkerServiceName[] = "nibble.v1.Worker";

class WorkerService : public v1::Worker::CallbackService {
 public:
  explicit WorkerService(Membership* membership) : membership_(membership) {}

  grpc::ServerUnaryReactor* GetInfo(grpc::CallbackServerContext* context, const v1::GetInfoRequest* request,
                                    v1::WorkerInfo* response) override;
  grpc::ServerUnaryReactor* Prepare(grpc::CallbackServerContext* context, const v1::PrepareRequest* request,
                                    v1::PrepareResponse* response) override;
  grpc::ServerUnaryReactor* Join(grpc::CallbackServerContext* context, const v1::JoinRequest* request,
                                 v1::JoinResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override;
  grpc::ServerBidiReactor<v1::StepPlan, v1::StepResult>* Execute(grpc::CallbackServerContext* context) override;

 private:
  Membership* const membership_;
};

}  // namespace nibble
