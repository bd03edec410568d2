// absl::Status ↔ grpc::Status, in one place. Codes are equal by number; google.rpc.BadRequest and google.rpc.RetryInfo
// travel as payloads of the absl::Status on one side and in the grpc-status-details-bin trailer on the other.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace nibble {

struct FieldViolation {
  std::string field;        // proto path: "sampling_params.top_p"
  std::string description;  // value and limit: "is 1.5, must be above 0 and at most 1"
};

// INVALID_ARGUMENT "FIELD DESCRIPTION", carrying the violation.
absl::Status InvalidFieldError(std::string_view field, std::string_view description);
// All of them in one status, joined by "; ". At least one.
absl::Status InvalidFieldsError(std::span<const FieldViolation> violations);
// What such a status carries; empty for any other.
std::vector<FieldViolation> FieldViolations(const absl::Status& status);

// The same status, telling the client when to try again.
absl::Status WithRetryAfter(absl::Status status, std::chrono::milliseconds delay);
std::optional<std::chrono::milliseconds> RetryAfter(const absl::Status& status);

// Who reads the message. Clients are strangers: INTERNAL, UNKNOWN and DATA_LOSS may name paths, tensors or addresses,
// so the text goes to the log under a short id and the client gets the id. Router and workers are one party and tell
// each other everything.
enum class Audience { kClient, kPeer };

// Trailers must fit in the receiver's metadata limit (8 KiB): messages are cut at 1 KiB, details at 3 KiB, both at
// whole UTF-8 characters; bytes that are not UTF-8 become '?'.
grpc::Status ToGrpcStatus(const absl::Status& status, Audience audience);
// Details that do not parse are dropped; code and message always arrive. Codes outside gRPC's range become UNKNOWN.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace nibble
