// absl::Status at every boundary. Messages say field, value and limit in one sentence.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define NIBBLE_RETURN_IF_ERROR(expression)                       \
  do {                                                           \
    if (absl::Status nibble_status = (expression); !nibble_status.ok()) \
      return nibble_status;                                      \
  } while (false)

#define NIBBLE_STATUS_CONCAT_(a, b) a##b
#define NIBBLE_STATUS_CONCAT(a, b) NIBBLE_STATUS_CONCAT_(a, b)

// NIBBLE_ASSIGN_OR_RETURN(auto x, F()): declares or assigns x, or returns F's error.
#define NIBBLE_ASSIGN_OR_RETURN(lhs, expression) \
  NIBBLE_ASSIGN_OR_RETURN_(NIBBLE_STATUS_CONCAT(nibble_status_or_, __LINE__), lhs, expression)
#define NIBBLE_ASSIGN_OR_RETURN_(variable, lhs, expression) \
  auto variable = (expression);                             \
  if (!variable.ok()) return std::move(variable).status();  \
  lhs = *std::move(variable)

namespace nibble {

// The same status with "context: " in front of its message.
inline absl::Status Annotate(const absl::Status& status, std::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), std::string(context) + ": " + std::string(status.message()));
}

}  // namespace nibble
