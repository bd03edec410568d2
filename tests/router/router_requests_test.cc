// What a client asks for comes out, or is refused with field, value and limit.
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/rpc/status.h"
#include "tests/router/router_rig.h"

namespace nibble::testing {
namespace {

using ::testing::HasSubstr;

using RouterRequests = RouterTest;

TEST_F(RouterRequests, GeneratesOnAGroupOfTwo) {
  AddReplica({Worker(), Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(3, 100, 300);
  request.mutable_sampling_params()->set_n(4);
  auto call = Begin(request);
  Wait(call.get());
  ExpectExact(*call);
  WaitIdle();
  EXPECT_EQ(worker(0, 0).live_slots(), worker(0, 1).live_slots());
}

TEST_F(RouterRequests, RunAheadOffGivesTheSame) {
  AddReplica({Worker()});
  StartRouter([](RouterConfig* c) { c->run_ahead = false; });
  WaitReady(1);
  ExpectServes(5);
}

TEST_F(RouterRequests, TextGoesInAndOut) {
  AddReplica({Worker()});
  StartRouter();
  v1::GetModelInfoResponse info;
  v1::TokenizeRequest tokenize;
  v1::TokenizeResponse tokens;
  v1::DetokenizeRequest detokenize;
  v1::DetokenizeResponse text;
  const std::string words(10000, 'a');  // long enough for the pool
  tokenize.set_text("It was — " + words);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.vocab_size(), 4096u);
    EXPECT_EQ(info.max_context_length(), 4096u);
  }
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Tokenize(&context, tokenize, &tokens).ok());
  }
  *detokenize.mutable_input_ids() = tokens.input_ids();
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Detokenize(&context, detokenize, &text).ok());
    EXPECT_EQ(text.text(), tokenize.text());
  }
}

TEST_F(RouterRequests, AStopStringFreesTheSequenceAtOnce) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(1, 3000);
  const std::vector<uint32_t> all = Expected(request);
  v1::DetokenizeRequest detokenize;
  v1::DetokenizeResponse stop;
  detokenize.set_skip_special_tokens(true);
  for (size_t i = 10; i < 16; ++i) detokenize.add_input_ids(all[i]);
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Detokenize(&context, detokenize, &stop).ok());
  ASSERT_FALSE(stop.text().empty());
  request.mutable_sampling_params()->add_stop(stop.text());
  auto call = Begin(request);
  Wait(call.get());
  ASSERT_TRUE(call->status.ok()) << call->status.error_message();
  EXPECT_EQ(call->finishes.at(0).matched_stop_str(), stop.text());
  EXPECT_LE(call->ids.at(0).size(), 16u);
  EXPECT_EQ(call->finishes.at(0).usage().completion_tokens(), call->ids.at(0).size());
  WaitIdle();
  EXPECT_LT(Status().replicas(0).steps(), 2500u);
}

TEST_F(RouterRequests, BadRequestsNameFieldValueAndLimit) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  auto request = Request(1, 10);
  request.mutable_sampling_params()->set_top_p(1.5f);
  request.mutable_sampling_params()->set_n(9);
  auto call = Begin(request);
  Wait(call.get());
  EXPECT_EQ(call->status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FieldViolations(FromGrpcStatus(call->status)).size(), 2u);
  EXPECT_THAT(call->status.error_message(), HasSubstr("sampling_params.top_p is 1.5"));

  v1::GenerateRequest huge;
  huge.set_text(std::string(1 << 20, 'x'));
  auto refused = Begin(huge);
  Wait(refused.get());
  EXPECT_EQ(refused->status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  huge.set_text(std::string(8 << 20, 'x'));
  auto too_large = Begin(huge);
  Wait(too_large.get());
  EXPECT_EQ(too_large->status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ExpectServes(3);
}

TEST_F(RouterRequests, InvalidUtf8IsNamed) {
  AddReplica({Worker()});
  StartRouter();
  WaitReady(1);
  const std::string bytes("\x12\x02\xff\xfe", 4);  // GenerateRequest.text, two bytes that are not UTF-8
  grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto call = stub.PrepareUnaryCall(&context, "/nibble.v1.Inference/Generate", request, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("not UTF-8"));
  ExpectServes(3);
}

}  // namespace
}  // namespace nibble::testing
