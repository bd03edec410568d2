// Logging: spdlog behind four functions and one pattern. One line per event, key=value, units in the keys.
//   LogInfo("replica ready replica={} pages={} load_ms={}", index, pages, ms);
#pragma once

#include <string_view>

#include <spdlog/spdlog.h>

#include "absl/status/status.h"

namespace nibble {

// Call once in main, before any thread. level: trace, debug, info, warn, error; role and id appear in every line
// ("router", "worker:50061"). Logs go to stderr.
absl::Status InitLogging(std::string_view role, std::string_view level);

template <typename... Args>
void LogDebug(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::debug(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogInfo(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::info(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogWarn(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::warn(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogError(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::error(format, std::forward<Args>(args)...);
}

}  // namespace nibble
