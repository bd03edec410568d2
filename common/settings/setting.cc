#include "common/settings/setting.h"

#include <algorithm>
#include <charconv>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/address.h"

namespace nibble {
namespace {

using Check = std::function<std::string(const std::string&)>;

Setting OfOneValue(std::string name, std::string value_name, const std::string& help, const std::string& standard,
                   Check check) {
  return {std::move(name), std::move(value_name), standard.empty() ? help : absl::StrCat(help, " [", standard, "]"),
          [check = std::move(check)](const std::vector<std::string>& values) -> std::string {
            if (values.size() == 1) return check(values[0]);
            return absl::StrCat("is given ", values.size(), " times, must be given once");
          }};
}

}  // namespace

Setting Setting::Text(std::string name, std::string value_name, const std::string& help, std::string* out) {
  return OfOneValue(std::move(name), std::move(value_name), help, *out, [out](const std::string& value) {
    *out = value;
    return std::string();
  });
}

Setting Setting::Address(std::string name, const std::string& help, std::string* out, bool may_be_empty) {
  return OfOneValue(std::move(name), "HOST:PORT", help, *out, [out, may_be_empty](const std::string& value) {
    *out = value;
    return value.empty() && may_be_empty ? std::string() : CheckAddress(value, /*may_be_port_0=*/true);
  });
}

Setting Setting::Switch(std::string name, const std::string& help, bool* out) {
  return OfOneValue(std::move(name), "on|off", help, *out ? "on" : "off", [out](const std::string& value) {
    *out = value == "on" || value == "true";
    const bool known = *out || value == "off" || value == "false";
    return known ? std::string() : absl::StrCat("is '", value, "', must be on or off");
  });
}

Setting Setting::Choice(std::string name, const std::string& help, std::vector<std::string> choices, std::string* out) {
  const std::string value_name = absl::StrJoin(choices, "|");
  return OfOneValue(
      std::move(name), value_name, help, *out, [choices = std::move(choices), out](const std::string& value) {
        *out = value;
        const bool known = std::find(choices.begin(), choices.end(), value) != choices.end();
        return known ? std::string() : absl::StrCat("is '", value, "', must be one of ", absl::StrJoin(choices, ", "));
      });
}

Setting Setting::Size(std::string name, const std::string& help, int64_t* out) {
  return OfOneValue(std::move(name), "SIZE", help, absl::StrCat(*out >> 20, "MiB"), [out](const std::string& value) {
    const absl::StatusOr<int64_t> bytes = ParseByteSize(value);
    if (bytes.ok()) *out = *bytes;
    return std::string(bytes.status().message());
  });
}

Setting Setting::LogLevel(std::string* out) {
  return Choice("log-level", "least severe lines that are logged", {"trace", "debug", "info", "warn", "error", "off"},
                out);
}

Setting Setting::Whole(std::string name, const std::string& help, int64_t low, int64_t high, int64_t value,
                       std::function<void(int64_t)> store) {
  return OfOneValue(std::move(name), "N", help, absl::StrCat(value),
                    [low, high, store = std::move(store)](const std::string& text) -> std::string {
                      int64_t number = 0;
                      const char* const end = text.data() + text.size();
                      const auto [rest, error] = std::from_chars(text.data(), end, number);
                      if (error != std::errc() || rest != end || number < low || number > high) {
                        return absl::StrCat("is '", text, "', must be a whole number from ", low, " to ", high);
                      }
                      store(number);
                      return "";
                    });
}

std::string CheckAddress(const std::string& address, bool may_be_port_0) {
  const absl::StatusOr<HostPort> parsed = ParseHostPort(address);
  if (!parsed.ok()) return absl::StrCat("is wrong: ", parsed.status().message());
  if (parsed->port == 0 && !may_be_port_0) return absl::StrCat("is '", address, "', its port must be 1 to 65535");
  return "";
}

absl::StatusOr<int64_t> ParseByteSize(const std::string& text) {
  static const std::pair<const char*, double> kUnits[] = {
      {"", 1},      {"B", 1},        {"kB", 1e3},     {"KB", 1e3},     {"MB", 1e6},    {"GB", 1e9},
      {"TB", 1e12}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40}};
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  double number = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + digits, number, std::chars_format::fixed);
  if (digits > 0 && error == std::errc() && rest == text.data() + digits) {
    for (const auto& [unit, factor] : kUnits) {
      const double bytes = number * factor;
      if (text.substr(digits) == unit && bytes >= 1 && bytes <= 0x1p50) return static_cast<int64_t>(bytes);
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("is '", text, "', must be a size from 1B to 1024TiB such as 64MiB or 2GiB"));
}

}  // namespace nibble
