// gRPC statuses as people and scripts read them.
#pragma once

#include <grpcpp/grpcpp.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/rpc/status.h"

namespace nibble {

// Exit codes of the command-line tools. A script can tell "fix the request" from "try again".
enum ExitCode : int {
  kExitOk = 0,
  kExitFailure = 1,        // the server failed, or a local file could not be written
  kExitUsage = 2,          // the command line is wrong; nothing was sent
  kExitRefused = 3,        // the server refused the request: INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, ...
  kExitTryAgain = 4,       // UNAVAILABLE, RESOURCE_EXHAUSTED, ABORTED, or the service did not get ready in time
  kExitDeadline = 5,       // the request's deadline passed
  kExitInterrupted = 130,  // Ctrl-C or SIGTERM; the request was cancelled
};

struct RpcError {
  std::string code;  // "INVALID_ARGUMENT"
  std::string message;
  std::vector<FieldViolation> violations;  // google.rpc.BadRequest
  std::optional<double> retry_after_s;     // google.rpc.RetryInfo
  int exit_code = kExitFailure;
};

const char* CodeName(grpc::StatusCode code);

RpcError ReadRpcError(const grpc::Status& status);

// "RESOURCE_EXHAUSTED: 2000 requests are waiting, the limit is 2000; try again in 0.5 s". One line.
std::string FormatRpcError(const RpcError& error);

// {"code", "message", "field_violations": [{"field", "description"}], "retry_after_s"}
nlohmann::json RpcErrorJson(const RpcError& error);

}  // namespace nibble
