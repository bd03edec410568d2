#include "router/config.h"

#include <charconv>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include <CLI/CLI.hpp>
#include <yaml-cpp/yaml.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/address.h"
#include "common/base/version.h"

namespace nibble {
namespace {

// One setting under one name, for the command line and for the file. `set` takes every value given and returns what is
// wrong with them, or nothing.
struct Setting {
  std::string name;
  std::string value_name;
  std::string help;
  std::function<std::string(const std::vector<std::string>&)> set;
};

// HOST:PORT; port 0 only where `zero` is allowed.
std::string CheckAddress(const std::string& address, bool zero) {
  const absl::StatusOr<HostPort> parsed = ParseHostPort(address);
  if (!parsed.ok()) return absl::StrCat("is wrong: ", parsed.status().message());
  if (parsed->port == 0 && !zero) return absl::StrCat("is '", address, "', its port must be 1 to 65535");
  return "";
}

std::string LastOnly(const std::vector<std::string>& values, std::string* out) {
  if (values.size() != 1) return absl::StrCat("is given ", values.size(), " times, must be given once");
  *out = values[0];
  return "";
}

Setting Text(std::string name, std::string value_name, std::string help, std::string* out) {
  return {std::move(name), std::move(value_name), std::move(help),
          [out](const std::vector<std::string>& values) { return LastOnly(values, out); }};
}

Setting Address(std::string name, std::string help, std::string* out, bool may_be_empty) {
  auto set = [out, may_be_empty](const std::vector<std::string>& values) -> std::string {
    if (std::string problem = LastOnly(values, out); !problem.empty()) return problem;
    if (out->empty() && may_be_empty) return "";
    return CheckAddress(*out, true);
  };
  return {std::move(name), "HOST:PORT", absl::StrCat(help, " [", *out, "]"), set};
}

template <typename T>
Setting Number(std::string name, std::string help, T low, T high, T* out) {
  auto set = [=](const std::vector<std::string>& values) -> std::string {
    std::string text;
    if (std::string problem = LastOnly(values, &text); !problem.empty()) return problem;
    T value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
      return absl::StrCat("is '", text, "', must be a whole number from ", low, " to ", high);
    }
    *out = value;
    return "";
  };
  return {std::move(name), "N", absl::StrCat(help, " [", *out, "]"), set};
}

Setting Switch(std::string name, std::string help, bool* out) {
  auto set = [out](const std::vector<std::string>& values) -> std::string {
    std::string text;
    if (std::string problem = LastOnly(values, &text); !problem.empty()) return problem;
    if (text == "on" || text == "true") {
      *out = true;
    } else if (text == "off" || text == "false") {
      *out = false;
    } else {
      return absl::StrCat("is '", text, "', must be on or off");
    }
    return "";
  };
  return {std::move(name), "on|off", absl::StrCat(help, " [", *out ? "on" : "off", "]"), set};
}

std::vector<Setting> Settings(RouterConfig* c) {
  constexpr uint32_t kDay_s = 86400;
  std::vector<Setting> settings = {
      Text("model", "DIR", "model directory: tokenizer.json and config.json", &c->model_dir),
      Address("listen", "address of the client API; port 0 lets the kernel choose", &c->listen, false),
      Address("metrics-listen", "address of /metrics; empty: none", &c->metrics_listen, true),
      Text("port-file", "FILE", "write the client API's port here once it is known", &c->port_file),
      Text("metrics-port-file", "FILE", "write the metrics port here once it is known", &c->metrics_port_file),
      {"replica", "HOST:PORT,...", "workers of one replica in rank order; once per replica",
       [c](const std::vector<std::string>& values) -> std::string {
         c->replicas.clear();
         for (const std::string& value : values) {
           c->replicas.push_back(absl::StrSplit(value, ','));
           for (const std::string& address : c->replicas.back()) {
             if (std::string problem = CheckAddress(address, false); !problem.empty()) return problem;
           }
         }
         return "";
       }},
      Number<uint32_t>("max-sequences", "sequences running on one replica", 1, 4096, &c->max_sequences),
      Number<uint32_t>("max-step-tokens", "token budget of one step", 1, 65536, &c->max_step_tokens),
      Number<uint32_t>("max-prefill-chunk", "prompt tokens of one sequence in one step", 1, 65536,
                       &c->max_prefill_chunk),
      Switch("run-ahead", "send the next plan before the tokens of the last one are back", &c->run_ahead),
      Switch("prefix-cache", "reuse the KV pages of equal prompt prefixes", &c->prefix_cache),
      Number<uint32_t>("max-waiting-requests", "sequences beyond the replicas' slots; more are refused", 1, 1u << 20,
                       &c->max_waiting_requests),
      Number<uint64_t>("max-waiting-tokens", "prompt tokens waiting, all replicas", 1, uint64_t{1} << 40,
                       &c->max_waiting_tokens),
      Number<uint32_t>("output-threads", "threads that turn ids into text", 1, 64, &c->output_threads),
      Number<uint32_t>("tokenizer-threads", "threads that encode long prompts", 1, 64, &c->tokenizer_threads),
      Number<uint32_t>("max-buffered-tokens", "tokens kept for a client that does not read; more cancels its request",
                       16, 1u << 24, &c->max_buffered_tokens),
      Number<uint32_t>("slow-client-timeout-s", "how long the end of a stream waits for its client to read", 1,
                       kDay_s, &c->slow_client_timeout_s),
      Number<uint32_t>("step-timeout-ms", "a step's result this late takes its replica down", 10, kDay_s * 1000,
                       &c->step_timeout_ms),
      Number<uint32_t>("load-timeout-s", "longest load of a worker's shard", 1, kDay_s, &c->load_timeout_s),
      Number<uint32_t>("join-timeout-s", "longest rendezvous of a replica's workers", 1, kDay_s, &c->join_timeout_s),
      Number<uint32_t>("ping-interval-ms", "how often a serving worker is asked whether it is still the same", 10,
                       kDay_s * 1000, &c->ping_interval_ms),
      Number<uint32_t>("replay-wait-ms", "how long a request waits when no replica is ready for it", 0,
                       kDay_s * 1000, &c->replay_wait_ms),
      Number<uint32_t>("drain-timeout-s", "how long SIGTERM waits for running requests", 0, kDay_s,
                       &c->drain_timeout_s),
      Text("log-level", "LEVEL", "trace, debug, info, warn, error or off [info]", &c->log_level),
      Text("tls-cert", "FILE", "certificate chain of the client API (PEM); none: plaintext", &c->tls_cert),
      Text("tls-key", "FILE", "its private key (PEM)", &c->tls_key),
      Text("tls-client-ca", "FILE", "clients must show a certificate signed by one of these (PEM)", &c->tls_client_ca),
      Text("worker-tls-ca", "FILE", "workers' certificates are signed by one of these (PEM); none: plaintext",
           &c->worker_tls_ca),
      Text("worker-tls-cert", "FILE", "certificate shown to workers (PEM)", &c->worker_tls_cert),
      Text("worker-tls-key", "FILE", "its private key (PEM)", &c->worker_tls_key),
  };
  return settings;
}

// The file's settings by name. A scalar is one value; a list is several; a list in a list (replica) joins with commas.
void ReadFile(const std::string& path, std::map<std::string, std::vector<std::string>>* values,
              std::vector<std::string>* problems) {
  try {
    const YAML::Node root = YAML::LoadFile(path);
    if (root.IsNull()) return;
    if (!root.IsMap()) {
      problems->push_back(absl::StrCat("config ", path, ": must be a map of settings"));
      return;
    }
    for (const auto& entry : root) {
      const std::string name = entry.first.as<std::string>();
      const YAML::Node& value = entry.second;
      std::vector<std::string> texts;
      if (value.IsScalar()) {
        texts.push_back(value.Scalar());
      } else if (value.IsSequence()) {
        for (const auto& item : value) {
          texts.push_back(item.IsSequence() ? absl::StrJoin(item.as<std::vector<std::string>>(), ",")
                                            : item.as<std::string>());
        }
      } else {
        problems->push_back(absl::StrCat("config ", path, ": ", name, " must be a value or a list"));
        continue;
      }
      if (!values->emplace(name, std::move(texts)).second) {
        problems->push_back(absl::StrCat("config ", path, ": ", name, " appears twice"));
      }
    }
  } catch (const YAML::Exception& e) {  // yaml-cpp throws; it ends here
    problems->push_back(absl::StrCat("config ", path, ": ", e.what()));
  }
}

// Rules between settings.
void CheckTogether(const RouterConfig& c, std::vector<std::string>* problems) {
  if (c.model_dir.empty()) {
    problems->push_back("model is not set, must be a model directory");
  } else {
    for (const char* file : {"config.json", "tokenizer.json"}) {
      std::error_code ignored;
      if (!std::filesystem::exists(std::filesystem::path(c.model_dir) / file, ignored)) {
        problems->push_back(absl::StrCat("model is '", c.model_dir, "', has no ", file));
      }
    }
  }
  if (c.replicas.empty()) problems->push_back("replica is not set, must name the workers of at least one replica");
  std::set<std::string> seen;
  for (const auto& replica : c.replicas) {
    for (const std::string& address : replica) {
      if (!seen.insert(address).second) problems->push_back(absl::StrCat("replica names ", address, " twice"));
    }
  }
  for (const auto& replica : c.replicas) {
    if (replica.size() != c.replicas[0].size()) {
      problems->push_back(absl::StrCat("replica '", absl::StrJoin(replica, ","), "' has ", replica.size(),
                                       " workers, must have as many as the first (", c.replicas[0].size(),
                                       "): a request continues on another replica only with the same arithmetic"));
    }
  }
  if (c.max_step_tokens < c.max_sequences) {
    problems->push_back(absl::StrCat("max-step-tokens is ", c.max_step_tokens, ", must be at least max-sequences (",
                                     c.max_sequences, "): every running sequence decodes one token per step"));
  }
  static const std::set<std::string> kLevels = {"trace", "debug", "info", "warn", "error", "off"};
  if (!kLevels.contains(c.log_level)) {
    problems->push_back(
        absl::StrCat("log-level is '", c.log_level, "', must be one of trace, debug, info, warn, error, off"));
  }
  if (c.tls_cert.empty() != c.tls_key.empty()) problems->push_back("tls-cert and tls-key must be set together");
  if (!c.tls_client_ca.empty() && c.tls_cert.empty()) problems->push_back("tls-client-ca needs tls-cert and tls-key");
  if (c.worker_tls_cert.empty() != c.worker_tls_key.empty()) {
    problems->push_back("worker-tls-cert and worker-tls-key must be set together");
  }
  if (c.worker_tls_ca.empty() && !c.worker_tls_cert.empty()) {
    problems->push_back("worker-tls-cert and worker-tls-key need worker-tls-ca");
  }
}

}  // namespace

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments) {
  CommandLine result;
  const std::vector<Setting> settings = Settings(&result.config);

  CLI::App app{"nibble-router: the gRPC front of a Nibble cluster", "nibble-router"};
  app.allow_extras();
  app.set_help_flag();  // handled here, so that parsing never leaves by an exception on the good path
  bool help = false, version = false;
  std::vector<std::string> config_files;
  app.add_flag("--help,-h", help, "print this text");
  app.add_flag("--version", version, "print the version");
  app.add_option("--config", config_files, "YAML file with the settings below; flags win")->type_name("FILE");
  std::map<std::string, std::vector<std::string>> flags;
  for (const Setting& s : settings) {
    app.add_option("--" + s.name, flags[s.name], s.help)->type_name(s.value_name)->allow_extra_args(false);
  }

  std::vector<std::string> problems;
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));  // CLI11 wants them reversed
  } catch (const CLI::Error& e) {
    problems.push_back(e.what());
  }
  if (help || version) {
    result.print_and_exit = true;
    result.text = help ? app.help() : absl::StrCat("nibble-router ", kVersion, "\n");
    return result;
  }
  for (const std::string& extra : app.remaining()) problems.push_back(absl::StrCat("'", extra, "' is not a setting"));

  std::map<std::string, std::vector<std::string>> file;
  if (config_files.size() > 1) problems.push_back("config is given more than once");
  for (const std::string& path : config_files) ReadFile(path, &file, &problems);
  for (const Setting& s : settings) {
    const std::vector<std::string>& flag = flags[s.name];
    const auto in_file = file.find(s.name);
    std::string problem;
    if (!flag.empty()) {
      problem = s.set(flag);
    } else if (in_file != file.end()) {
      problem = s.set(in_file->second);
    }
    if (!problem.empty()) problems.push_back(absl::StrCat(s.name, " ", problem));
    if (in_file != file.end()) file.erase(in_file);
  }
  for (const auto& [name, values] : file) {
    problems.push_back(absl::StrCat("config ", config_files[0], ": '", name, "' is not a setting"));
  }
  CheckTogether(result.config, &problems);
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  return result;
}

}  // namespace nibble
