#include <grpcpp/client_context.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>

#include "common/base/file.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "nibble/v1/worker.grpc.pb.h"

namespace nibble {
namespace {

using std::chrono::milliseconds;

class EchoWorker : public v1::Worker::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetInfo(grpc::CallbackServerContext* context, const v1::GetInfoRequest* request,
                                    v1::WorkerInfo* response) override {
    response->set_protocol_version(request->protocol_version());
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  grpc::ServerUnaryReactor* Join(grpc::CallbackServerContext* context, const v1::JoinRequest*,
                                 v1::JoinResponse*) override {
    auto* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(InvalidFieldError("epoch", "is 1, must be above 1"), Audience::kPeer));
    return reactor;
  }
};

struct Served {
  EchoWorker service;
  std::unique_ptr<RpcServer> server;
  std::unique_ptr<v1::Worker::Stub> stub;
};

std::unique_ptr<Served> Serve(RpcServerOptions options = {}) {
  auto served = std::make_unique<Served>();
  options.listen = "127.0.0.1:0";
  grpc::Service* services[] = {&served->service};
  auto server = RpcServer::Start(options, services);
  EXPECT_TRUE(server.ok()) << server.status();
  served->server = *std::move(server);
  served->stub = v1::Worker::NewStub(*CreateChannel(served->server->address().ToString()));
  return served;
}

grpc::Status GetInfo(v1::Worker::Stub& stub, uint32_t version, v1::WorkerInfo* info) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  v1::GetInfoRequest request;
  request.set_protocol_version(version);
  return stub.GetInfo(&context, request, info);
}

TEST(RpcServer, ServesOnAPortOfTheKernelsChoice) {
  auto served = Serve();
  EXPECT_GT(served->server->address().port, 0);
  v1::WorkerInfo info;
  EXPECT_TRUE(GetInfo(*served->stub, 5, &info).ok());
  EXPECT_EQ(info.protocol_version(), 5u);
}

TEST(RpcServer, ErrorDetailsCrossTheWire) {
  auto served = Serve();
  grpc::ClientContext context;
  v1::JoinResponse response;
  const absl::Status status = FromGrpcStatus(served->stub->Join(&context, {}, &response));
  EXPECT_EQ(status, InvalidFieldError("epoch", "is 1, must be above 1"));
  EXPECT_EQ(FieldViolations(status).size(), 1u);
}

TEST(RpcServer, ATakenPortIsAClearError) {
  auto served = Serve();
  EchoWorker second;
  grpc::Service* services[] = {&second};
  RpcServerOptions options;
  options.listen = served->server->address().ToString();
  const auto server = RpcServer::Start(options, services);
  EXPECT_EQ(server.status(), absl::UnavailableError("cannot listen on " + options.listen + ": Address already in use"));
}

TEST(RpcServer, LargeAndCompressedRequestsAreRefused) {
  RpcServerOptions options;
  options.max_receive_message_bytes = 1000;
  auto served = Serve(options);
  v1::JoinRequest request;
  request.add_endpoints(std::string(2000, 'x'));
  v1::JoinResponse response;
  grpc::ClientContext large;
  EXPECT_EQ(served->stub->Join(&large, request, &response).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  grpc::ClientContext compressed;
  compressed.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  EXPECT_EQ(served->stub->Join(&compressed, request, &response).error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST(RpcServer, TlsOptionsAreCheckedBeforeListening) {
  EchoWorker service;
  grpc::Service* services[] = {&service};
  const auto start = [&](TlsOptions tls) {
    RpcServerOptions options;
    options.listen = "127.0.0.1:0";
    options.tls = std::move(tls);
    return RpcServer::Start(options, services).status();
  };
  EXPECT_EQ(start({.certificate_file = "/none"}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start({.certificate_file = "/none", .key_file = "/none"}).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(start({.ca_file = "/none"}).code(), absl::StatusCode::kInvalidArgument);
  const std::string not_pem = testing::TempDir() + "nibble_not_a_certificate";
  ASSERT_TRUE(WriteFileAtomically(not_pem, "hello").ok());
  EXPECT_EQ(start({.certificate_file = not_pem, .key_file = not_pem}).code(), absl::StatusCode::kInvalidArgument);
  unlink(not_pem.c_str());
}

TEST(CreateChannel, ChecksItsAddress) {
  EXPECT_EQ(CreateChannel("localhost").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateChannel("localhost:0").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nibble
