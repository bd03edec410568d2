#include "tools/client/rpc_error.h"

#include <chrono>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace nibble {
namespace {

int ExitCodeOf(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::OK:
      return kExitOk;
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::NOT_FOUND:
    case grpc::StatusCode::ALREADY_EXISTS:
    case grpc::StatusCode::PERMISSION_DENIED:
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::FAILED_PRECONDITION:
    case grpc::StatusCode::OUT_OF_RANGE:
    case grpc::StatusCode::UNIMPLEMENTED:
      return kExitRefused;
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
    case grpc::StatusCode::ABORTED:
      return kExitTryAgain;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return kExitDeadline;
    default:  // CANCELLED too: a signal to this process is the command's to notice
      return kExitFailure;
  }
}

}  // namespace

const char* CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const int i = static_cast<int>(code);
  return i >= 0 && i < static_cast<int>(std::size(kNames)) ? kNames[i] : "UNKNOWN";
}

RpcError ReadRpcError(const grpc::Status& status) {
  const absl::Status parsed = FromGrpcStatus(status);
  RpcError error{.code = CodeName(status.error_code()),
                 .message = std::string(parsed.message()),
                 .violations = FieldViolations(parsed),
                 .exit_code = ExitCodeOf(status.error_code())};
  if (const auto delay = RetryAfter(parsed)) error.retry_after_s = std::chrono::duration<double>(*delay).count();
  return error;
}

std::string FormatRpcError(const RpcError& error) {
  std::string line = absl::StrCat(error.code, ": ", error.message.empty() ? "no reason given" : error.message);
  for (const auto& [field, description] : error.violations) {
    // The message usually is "FIELD DESCRIPTION" of the violations already: then there is nothing to add.
    const bool said =
        error.message.find(field) != std::string::npos && error.message.find(description) != std::string::npos;
    if (!said) absl::StrAppend(&line, "; ", field, " ", description);
  }
  if (error.retry_after_s) absl::StrAppendFormat(&line, "; try again in %.3g s", *error.retry_after_s);
  return absl::StrReplaceAll(line, {{"\n", " "}, {"\r", " "}, {"\x1b", "?"}});
}

nlohmann::json RpcErrorJson(const RpcError& error) {
  nlohmann::json violations = nlohmann::json::array();
  for (const auto& [field, description] : error.violations) {
    violations.push_back({{"field", field}, {"description", description}});
  }
  nlohmann::json json = {{"code", error.code}, {"message", error.message}, {"field_violations", violations}};
  json["retry_after_s"] = error.retry_after_s ? nlohmann::json(*error.retry_after_s) : nlohmann::json(nullptr);
  return json;
}

}  // namespace nibble
