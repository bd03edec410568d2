#include <gtest/gtest.h>
#include <spdlog/fmt/fmt.h>

#include <chrono>
#include <string>
#include <vector>

#include "common/rpc/status.h"
#include "google/rpc/status.pb.h"

namespace nibble {
namespace {

using std::chrono::milliseconds;

TEST(RpcStatus, EveryCodeSurvivesTheRoundTrip) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "top_p is 2, must be at most 1");
    const grpc::Status wire = ToGrpcStatus(status, Audience::kPeer);
    EXPECT_EQ(static_cast<int>(wire.error_code()), code);
    EXPECT_EQ(FromGrpcStatus(wire), status);
  }
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus(), Audience::kClient).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  EXPECT_EQ(FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(77), "?")).code(), absl::StatusCode::kUnknown);
}

TEST(RpcStatus, ViolationsAndRetryDelaySurvive) {
  const std::vector<FieldViolation> violations = {{"sampling_params.top_p", "is 2, must be at most 1"},
                                                  {"priority", "is 101, must be at most 100"}};
  const absl::Status status = WithRetryAfter(InvalidFieldsError(violations), milliseconds(1250));
  EXPECT_EQ(std::string(status.message()),
            "sampling_params.top_p is 2, must be at most 1; priority is 101, must be at most 100");
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status, Audience::kClient));
  EXPECT_EQ(back, status);
  ASSERT_EQ(FieldViolations(back).size(), 2u);
  EXPECT_EQ(FieldViolations(back)[1].field, "priority");
  EXPECT_EQ(FieldViolations(back)[1].description, "is 101, must be at most 100");
  EXPECT_EQ(RetryAfter(back), milliseconds(1250));
  EXPECT_EQ(RetryAfter(absl::UnavailableError("")), std::nullopt);
  EXPECT_TRUE(FieldViolations(absl::InvalidArgumentError("")).empty());
}

TEST(RpcStatus, ClientsNeverReadInternalErrors) {
  for (const auto code : {absl::StatusCode::kInternal, absl::StatusCode::kUnknown, absl::StatusCode::kDataLoss}) {
    const absl::Status status(code, "read /srv/models/secret failed at 0x7ffd");
    const grpc::Status wire = ToGrpcStatus(status, Audience::kClient);
    EXPECT_EQ(static_cast<int>(wire.error_code()), static_cast<int>(code));
    EXPECT_EQ(wire.error_message().find("secret"), std::string::npos) << wire.error_message();
    EXPECT_EQ(wire.error_details().find("secret"), std::string::npos);
    EXPECT_NE(ToGrpcStatus(status, Audience::kPeer).error_message().find("secret"), std::string::npos);
  }
}

TEST(RpcStatus, TrailersStaySmallAndUtf8) {
  std::vector<FieldViolation> violations;
  for (int i = 0; i < 1000; ++i)
    violations.push_back({fmt::format("stop[{}]", i), fmt::format("{:x<500}\xff\xc3", "")});
  const grpc::Status wire = ToGrpcStatus(InvalidFieldsError(violations), Audience::kClient);
  EXPECT_LE(wire.error_message().size(), 1024u);
  EXPECT_LE(wire.error_details().size(), 4096u);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(wire.error_details()));
  EXPECT_GE(FieldViolations(FromGrpcStatus(wire)).size(), 4u);
  // Cut between characters, never inside one.
  const grpc::Status cut = ToGrpcStatus(absl::NotFoundError(fmt::format("{:a<1023}é", "")), Audience::kPeer);
  EXPECT_EQ(cut.error_message(), std::string(1023, 'a'));
  EXPECT_EQ(ToGrpcStatus(absl::NotFoundError("a\xff\xe2\x82"
                                             "b\x01\xe2\x82\xac\xed\xa0\x80"),
                         Audience::kPeer)
                .error_message(),
            "a???b?\xe2\x82\xac???");
}

TEST(RpcStatus, HostileDetailsAreDropped) {
  const absl::Status garbage =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone", "\xff\xff\xff not a proto"));
  EXPECT_EQ(garbage, absl::UnavailableError("gone"));
  google::rpc::Status wire;
  auto* detail = wire.add_details();
  detail->set_type_url("type.googleapis.com/google.rpc.RetryInfo");
  detail->set_value("\x0a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f");  // 2^63 - 1 seconds, in a field cut short
  EXPECT_EQ(RetryAfter(FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "", wire.SerializeAsString()))),
            std::nullopt);
  detail->set_value("\x0a\x0a\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f");
  EXPECT_EQ(RetryAfter(FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "", wire.SerializeAsString()))),
            milliseconds(86400000));
}

}  // namespace
}  // namespace nibble
