#include "worker/config.h"

#include <spdlog/fmt/fmt.h>
#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <system_error>
#include <utility>

#include "common/base/address.h"
#include "common/base/file.h"
#include "common/base/version.h"

namespace nibble {
namespace {

// One setting, under one name on the command line and in the file. `set` returns what is wrong with the value, or
// nothing.
struct Setting {
  std::string name;
  std::string value_name;
  std::string help;
  std::function<std::string(const std::string&)> set;
};

Setting Text(std::string name, std::string value_name, std::string help, std::string* out) {
  return {std::move(name), std::move(value_name), std::move(help), [out](const std::string& value) {
            *out = value;
            return std::string();
          }};
}

Setting Address(std::string name, const std::string& help, std::string* out, bool may_be_empty) {
  return {std::move(name), "HOST:PORT", help, [=](const std::string& value) -> std::string {
            *out = value;
            if (value.empty() && may_be_empty) return "";
            const auto parsed = ParseHostPort(value);
            return parsed.ok() ? "" : fmt::format("is wrong: {}", std::string(parsed.status().message()));
          }};
}

template <typename T>
Setting Number(std::string name, const std::string& help, int64_t low, int64_t high, T* out) {
  return {std::move(name), "N", fmt::format("{} [{}]", help, *out), [=](const std::string& value) -> std::string {
            int64_t number = 0;
            const char* end = value.data() + value.size();
            const auto [rest, error] = std::from_chars(value.data(), end, number);
            if (error != std::errc() || rest != end || number < low || number > high) {
              return fmt::format("is '{}', must be a whole number from {} to {}", value, low, high);
            }
            *out = static_cast<T>(number);
            return "";
          }};
}

Setting OneOf(std::string name, const std::string& help, std::vector<std::string> choices, std::string* out) {
  return {std::move(name), fmt::format("{}", fmt::join(choices, "|")), fmt::format("{} [{}]", help, *out),
          [choices, out](const std::string& value) -> std::string {
            *out = value;
            if (std::find(choices.begin(), choices.end(), value) != choices.end()) return "";
            return fmt::format("is '{}', must be one of {}", value, fmt::join(choices, ", "));
          }};
}

std::vector<Setting> Settings(WorkerConfig* c) {
  constexpr int64_t kDay_s = 86400;
  return {
      Text("model", "DIR", "model directory: config.json and tensors; mock reads config.json alone", &c->model_dir),
      Address("listen", "address routers reach this worker at; port 0: any free one [127.0.0.1:50061]", &c->listen,
              false),
      Text("port-file", "FILE", "write the port here once the worker serves", &c->port_file),
      Address("metrics-listen", "address of /metrics; empty: none [none]", &c->metrics_listen, true),
      Text("metrics-port-file", "FILE", "write the metrics port here once the worker serves", &c->metrics_port_file),
      OneOf("backend", "what computes; auto: cuda when there is one, else cpu", {"auto", "cpu", "cuda", "mock"},
            &c->backend),
      Number("threads", "CPU threads; 0: the machine's, divided by the ranks of the group (they are taken to share it)",
             0, 1024, &c->threads),
      Number("device", "CUDA device ordinal", 0, 1023, &c->device),
      {"kv-memory", "SIZE", "memory of the KV page pool, such as 64MiB or 2GiB [512MiB]",
       [c](const std::string& value) -> std::string {
         const auto bytes = ParseByteSize(value);
         if (!bytes.ok()) return std::string(bytes.status().message());
         c->kv_memory_bytes = *bytes;
         return "";
       }},
      Number("mock-step-us", "duration of a step of the mock backend, microseconds", 0, 60 * 1000 * 1000,
             &c->mock_step_us),
      Text("advertise-host", "HOST", "own address the other ranks of a group connect to [127.0.0.1]",
           &c->advertise_host),
      Number("collective-timeout-ms", "a peer that is silent this long inside a collective or rendezvous has failed",
             10, 600 * 1000, &c->collective_timeout_ms),
      Number("drain-timeout-s", "how long SIGTERM waits for running sequences", 0, kDay_s, &c->drain_timeout_s),
      Text("tls-cert", "FILE", "certificate chain (PEM); none: plaintext", &c->tls.certificate_file),
      Text("tls-key", "FILE", "private key of --tls-cert (PEM)", &c->tls.key_file),
      Text("tls-client-ca", "FILE", "demand client certificates signed by this CA (PEM)", &c->tls.ca_file),
      OneOf("log-level", "least severe lines that are logged", {"trace", "debug", "info", "warn", "error", "off"},
            &c->log_level),
  };
}

// Top-level scalars only; what else a file may hold is a problem, not a surprise.
void ReadConfigFile(const std::string& path, std::map<std::string, std::string>* values,
                    std::vector<std::string>* problems) {
  const auto contents = ReadSmallFile(path);
  if (!contents.ok()) return problems->push_back(fmt::format("config: {}", std::string(contents.status().message())));
  try {
    const YAML::Node root = YAML::Load(*contents);
    if (root.IsNull()) return;
    if (!root.IsMap()) return problems->push_back(fmt::format("config: {} is no map of settings", path));
    for (const auto& entry : root) {
      const std::string name = entry.first.as<std::string>();
      if (!entry.second.IsScalar()) {
        problems->push_back(fmt::format("{}: must be one value (in {})", name, path));
      } else if (!values->emplace(name, entry.second.as<std::string>()).second) {
        problems->push_back(fmt::format("{}: is given twice (in {})", name, path));
      }
    }
  } catch (const YAML::Exception& e) {
    problems->push_back(fmt::format("config: {}: {}", path, e.what()));
  }
}

void CheckTogether(const WorkerConfig& c, std::vector<std::string>* problems) {
  std::error_code error;
  if (c.model_dir.empty()) {
    problems->push_back("model: is missing, give the model directory");
  } else if (!std::filesystem::is_directory(c.model_dir, error)) {
    problems->push_back(fmt::format("model: '{}' is no directory", c.model_dir));
  }
  if (c.tls.certificate_file.empty() != c.tls.key_file.empty()) {
    problems->push_back("tls-cert, tls-key: one is given without the other");
  }
  if (!c.tls.ca_file.empty() && c.tls.certificate_file.empty()) {
    problems->push_back("tls-client-ca: needs tls-cert and tls-key");
  }
  if (c.mock_step_us > 0 && c.backend != "mock") problems->push_back("mock-step-us: needs backend mock");
}

}  // namespace

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
      fmt::format("is '{}', must be a size from 1B to 1024TiB such as 64MiB or 2GiB", text));
}

absl::StatusOr<WorkerCommandLine> ParseWorkerCommandLine(const std::vector<std::string>& arguments) {
  WorkerCommandLine line;
  const std::vector<Setting> settings = Settings(&line.config);

  CLI::App app(
      "nibble-worker: holds one shard of a model and executes the router's plans.\n"
      "Every flag may also stand in the --config file, without the dashes.",
      "nibble-worker");
  app.allow_extras();
  app.set_version_flag("--version", kVersion);
  std::string config_file;
  std::map<std::string, std::vector<std::string>> given;
  for (const Setting& setting : settings) {
    app.add_option("--" + setting.name, given[setting.name], setting.help)
        ->type_name(setting.value_name)
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  }
  app.add_option("--config", config_file, "YAML file with the same names; flags win")->type_name("FILE");

  std::vector<std::string> problems;
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // CLI11 takes them from the back
  try {
    app.parse(std::move(reversed));
  } catch (const CLI::CallForHelp&) {
    return WorkerCommandLine{.print_and_exit = true, .text = app.help()};
  } catch (const CLI::CallForVersion&) {
    return WorkerCommandLine{.print_and_exit = true, .text = fmt::format("nibble-worker {}\n", kVersion)};
  } catch (const CLI::ParseError& e) {
    problems.push_back(e.what());
  }
  for (const std::string& extra : app.remaining())
    problems.push_back(fmt::format("'{}' is no flag of nibble-worker", extra));

  std::map<std::string, std::string> values;
  if (!config_file.empty()) ReadConfigFile(config_file, &values, &problems);
  for (const auto& [name, value] : values) {
    if (given.count(name) == 0)
      problems.push_back(fmt::format("{}: is no setting of nibble-worker (in {})", name, config_file));
  }
  for (const auto& [name, flags] : given) {
    if (flags.size() > 1)
      problems.push_back(fmt::format("{}: is given {} times, must be given once", name, flags.size()));
    if (!flags.empty()) values[name] = flags.back();
  }
  for (const Setting& setting : settings) {
    const auto value = values.find(setting.name);
    if (value == values.end()) continue;
    const std::string problem = setting.set(value->second);
    if (!problem.empty()) problems.push_back(fmt::format("{}: {}", setting.name, problem));
  }
  CheckTogether(line.config, &problems);
  if (!problems.empty()) return absl::InvalidArgumentError(fmt::format("{}", fmt::join(problems, "\n")));
  return line;
}

}  // namespace nibble
