#include "common/rpc/status.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdint>
#include <random>

#include "absl/strings/cord.h"
#include "common/base/check.h"
#include "common/base/log.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace nibble {
namespace {

constexpr char kBadRequestUrl[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";
constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxDetailsBytes = 3072;
constexpr size_t kMaxViolationBytes = 256;

// Length of the UTF-8 character at the start of `text`, 0 when there is none (overlong forms and surrogates included).
size_t Utf8Length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xf0 && lead <= 0xf4  ? 4
                        : lead >= 0xe0 && lead < 0xf0 ? 3
                        : lead >= 0xc2 && lead < 0xe0 ? 2
                                                      : 0;
  if (length == 0 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  if ((lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xed && byte(1) > 0x9f)) return 0;
  if ((lead == 0xf0 && byte(1) < 0x90) || (lead == 0xf4 && byte(1) > 0x8f)) return 0;
  return length;
}

// proto3 strings must be UTF-8, or the receiver drops the whole message.
std::string CleanText(std::string_view text, size_t max_bytes) {
  std::string out;
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
    const bool control = length == 1 && static_cast<uint8_t>(text[0]) < 0x20 && text[0] != '\n' && text[0] != '\t';
    const size_t step = length == 0 ? 1 : length;
    if (out.size() + step > max_bytes) break;
    if (length == 0 || control) {
      out += '?';
    } else {
      out += text.substr(0, length);
    }
    text.remove_prefix(step);
  }
  return out;
}

bool IsOpaqueToClients(absl::StatusCode code) {
  return code == absl::StatusCode::kInternal || code == absl::StatusCode::kUnknown ||
         code == absl::StatusCode::kDataLoss;
}

std::string HideBehindId(const absl::Status& status) {
  static thread_local std::minstd_rand random(std::random_device{}());
  const std::string id = fmt::format("{:08x}", static_cast<uint32_t>(random()));
  LogError("error hidden from a client id={} status=\"{}\"", id, status.ToString());
  return fmt::format("internal error {}; the server's log has the details under this id", id);
}

template <typename Message>
std::optional<Message> GetPayload(const absl::Status& status, const char* url) {
  const auto payload = status.GetPayload(url);
  Message message;
  if (!payload || !message.ParseFromString(std::string(*payload))) return std::nullopt;
  return message;
}

std::string PackDetails(const absl::Status& status, const std::string& message) {
  google::rpc::Status wire;
  wire.set_code(static_cast<int>(status.code()));
  wire.set_message(message);
  if (auto bad_request = GetPayload<google::rpc::BadRequest>(status, kBadRequestUrl)) {
    google::rpc::BadRequest cut;
    size_t bytes = 0;
    for (const auto& violation : bad_request->field_violations()) {
      auto* copy = cut.add_field_violations();
      copy->set_field(CleanText(violation.field(), kMaxViolationBytes));
      copy->set_description(CleanText(violation.description(), kMaxViolationBytes));
      bytes += copy->ByteSizeLong() + 4;
      if (bytes + message.size() > kMaxDetailsBytes) {
        cut.mutable_field_violations()->RemoveLast();
        break;
      }
    }
    wire.add_details()->PackFrom(cut);
  }
  if (auto retry = GetPayload<google::rpc::RetryInfo>(status, kRetryInfoUrl)) wire.add_details()->PackFrom(*retry);
  return wire.details().empty() ? std::string() : wire.SerializeAsString();
}

}  // namespace

absl::Status InvalidFieldError(std::string_view field, std::string_view description) {
  const FieldViolation violation{std::string(field), std::string(description)};
  return InvalidFieldsError({&violation, 1});
}

absl::Status InvalidFieldsError(std::span<const FieldViolation> violations) {
  NIBBLE_CHECK(!violations.empty());
  google::rpc::BadRequest bad_request;
  std::string message;
  for (const FieldViolation& violation : violations) {
    // Cleaned here already: serializing a proto3 string that is not UTF-8 would be refused by the parser.
    const std::string field = CleanText(violation.field, kMaxViolationBytes);
    const std::string description = CleanText(violation.description, kMaxViolationBytes);
    message += fmt::format("{}{} {}", message.empty() ? "" : "; ", field, description);
    auto* wire = bad_request.add_field_violations();
    wire->set_field(field);
    wire->set_description(description);
  }
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kBadRequestUrl, absl::Cord(bad_request.SerializeAsString()));
  return status;
}

std::vector<FieldViolation> FieldViolations(const absl::Status& status) {
  std::vector<FieldViolation> violations;
  if (auto bad_request = GetPayload<google::rpc::BadRequest>(status, kBadRequestUrl)) {
    for (const auto& v : bad_request->field_violations()) violations.push_back({v.field(), v.description()});
  }
  return violations;
}

absl::Status WithRetryAfter(absl::Status status, std::chrono::milliseconds delay) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(delay.count() / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1000) * 1000000);
  status.SetPayload(kRetryInfoUrl, absl::Cord(retry.SerializeAsString()));
  return status;
}

std::optional<std::chrono::milliseconds> RetryAfter(const absl::Status& status) {
  const auto retry = GetPayload<google::rpc::RetryInfo>(status, kRetryInfoUrl);
  if (!retry) return std::nullopt;
  // A peer may send anything: clamp to a day before multiplying.
  const int64_t seconds = std::clamp<int64_t>(retry->retry_delay().seconds(), 0, 86400);
  const int64_t nanos = std::clamp<int64_t>(retry->retry_delay().nanos(), 0, 999999999);
  return std::chrono::milliseconds(seconds * 1000 + nanos / 1000000);
}

grpc::Status ToGrpcStatus(const absl::Status& status, Audience audience) {
  if (status.ok()) return grpc::Status::OK;
  const bool hide = audience == Audience::kClient && IsOpaqueToClients(status.code());
  const std::string message = hide ? HideBehindId(status) : CleanText(std::string(status.message()), kMaxMessageBytes);
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message, PackDetails(status, message));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = static_cast<int>(status.error_code());
  const bool known = code >= 1 && code <= 16;
  absl::Status result(known ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kUnknown, status.error_message());
  google::rpc::Status wire;
  if (!status.error_details().empty() && wire.ParseFromString(status.error_details())) {
    for (const auto& detail : wire.details()) {
      if (detail.type_url() == kBadRequestUrl || detail.type_url() == kRetryInfoUrl) {
        result.SetPayload(detail.type_url(), absl::Cord(detail.value()));
      }
    }
  }
  return result;
}

}  // namespace nibble
