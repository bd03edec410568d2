// JSON from files nobody vouches for: bounded size, bounded nesting, no duplicate keys. Nothing throws.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace nibble {

inline constexpr int64_t kMaxJsonNesting = 32;
inline constexpr int64_t kMaxConfigBytes = int64_t{4} << 20;

// `text` as JSON. INVALID_ARGUMENT for a syntax error, invalid UTF-8, a key that occurs twice in one object, or nesting
// deeper than kMaxJsonNesting. `what` names the text in messages ("/models/x/config.json").
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what);

// A JSON file whose top level is an object. Errors as of ReadSmallFile and ParseJson.
absl::StatusOr<nlohmann::json> ReadJsonObject(const std::string& path, int64_t max_bytes = kMaxConfigBytes);

// Text from a file made fit for a message or a log line: control bytes escaped, cut at 120 bytes.
std::string Quoted(std::string_view text);

// An errno value as the Status an operator can act on: ENOENT NOT_FOUND, EACCES PERMISSION_DENIED, ENOSPC, EDQUOT and
// EFBIG RESOURCE_EXHAUSTED, ...; the message is "<doing> <path>: <reason>".
absl::Status FileError(int error_number, std::string_view doing, const std::string& path);

}  // namespace nibble
