// One thing an operator can set, under one name on the command line and in the configuration file.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

struct Setting {
  std::string name;
  std::string value_name;
  std::string help;  // ends with the default in brackets
  // Takes every value given and returns what is wrong with them ("is 'x', must be on or off"), or nothing.
  std::function<std::string(const std::vector<std::string>&)> set;

  // Of one value. `*out` holds the default and outlives the setting.
  static Setting Text(std::string name, std::string value_name, const std::string& help, std::string* out);
  static Setting Address(std::string name, const std::string& help, std::string* out, bool may_be_empty);
  static Setting Switch(std::string name, const std::string& help, bool* out);
  static Setting Choice(std::string name, const std::string& help, std::vector<std::string> choices, std::string* out);
  static Setting Size(std::string name, const std::string& help, int64_t* out);
  static Setting LogLevel(std::string* out);
  template <typename T>
  static Setting Number(std::string name, const std::string& help, int64_t low, int64_t high, T* out) {
    return Whole(std::move(name), help, low, high, static_cast<int64_t>(*out),
                 [out](int64_t value) { *out = static_cast<T>(value); });
  }

 private:
  static Setting Whole(std::string name, const std::string& help, int64_t low, int64_t high, int64_t value,
                       std::function<void(int64_t)> store);
};

// What is wrong with HOST:PORT, or nothing. Port 0, any free one, only where it may be.
std::string CheckAddress(const std::string& address, bool may_be_port_0);

// "1048576", "64MiB", "2GiB", "1.5GiB", "200MB"; binary (KiB, MiB, GiB, TiB) and decimal (kB, MB, GB, TB) units.
// INVALID_ARGUMENT quotes the text.
absl::StatusOr<int64_t> ParseByteSize(const std::string& text);

}  // namespace nibble
