// Small files, whole: configuration, certificates, port files.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nibble {

// The whole regular file. NOT_FOUND, PERMISSION_DENIED, INVALID_ARGUMENT (larger than max_bytes, or a directory, device
// or pipe), all with path and reason.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes = int64_t{1} << 20);

// Readers see the old contents or the new, never a part: written beside, synced, renamed. After an error nothing is
// left behind.
absl::Status WriteFileAtomically(const std::string& path, std::string_view contents);

}  // namespace nibble
