#include "common/base/log.h"

#include <string>

#include <spdlog/sinks/stdout_color_sinks.h>

namespace nibble {

absl::Status InitLogging(std::string_view role, std::string_view level) {
  const auto parsed = spdlog::level::from_str(std::string(level));
  if (parsed == spdlog::level::off && level != "off") {
    return absl::InvalidArgumentError("log-level is '" + std::string(level) +
                                      "', must be one of trace, debug, info, warn, error, off");
  }
  auto logger = spdlog::stderr_color_mt(std::string(role));
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%L%$ %n %v");
  logger->set_level(parsed);
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace nibble
