#include "tools/cli/request_flags.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <istream>
#include <iterator>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

// "128000:-5" → one entry of logit_bias.
void SetLogitBias(const std::string& text, v1::SamplingParams* params) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  uint32_t id = 0;
  float bias = 0;
  if (!absl::SimpleAtoi(parts.first, &id) || !absl::SimpleAtof(parts.second, &bias)) {
    throw CLI::ValidationError("--logit-bias", "'" + text + "' must be TOKEN_ID:BIAS");  // caught by CLI11 in main
  }
  (*params->mutable_logit_bias())[id] = bias;
}

// Protobuf strings must be UTF-8; saying so here beats the server's "failed to parse".
absl::Status CheckUtf8(std::string_view text, const char* what) {
  const size_t offset = ValidUtf8Prefix(text);
  if (offset == text.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is not valid UTF-8 at byte ", offset));
}

absl::Status SetTokenIds(const std::string& ids, v1::TokenIds* tokens) {
  for (const absl::string_view piece : absl::StrSplit(ids, absl::ByAnyChar(", "), absl::SkipEmpty())) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(piece, &id)) {
      return absl::InvalidArgumentError(absl::StrCat("--token-ids has '", piece, "', must be numbers like 1,2,3"));
    }
    tokens->add_input_ids(id);
  }
  if (tokens->input_ids().empty())
    return absl::InvalidArgumentError("--token-ids is empty, must be numbers like 1,2,3");
  return absl::OkStatus();
}

}  // namespace

void AddSamplingFlags(CLI::App* app, v1::GenerateRequest* request) {
  v1::SamplingParams* p = request->mutable_sampling_params();
  const auto add = [app]<typename T>(const char* name, std::function<void(const T&)> set, const char* text) {
    return app->add_option_function<T>(name, std::move(set), text)->group("Sampling");
  };
  add.operator()<uint32_t>(
      "--max-tokens", [p](uint32_t v) { p->set_max_tokens(v); }, "Most tokens to generate");
  add.operator()<uint32_t>(
      "--min-tokens", [p](uint32_t v) { p->set_min_tokens(v); }, "No end before this many tokens");
  add.operator()<float>(
      "--temperature", [p](float v) { p->set_temperature(v); }, "0 = greedy (server default: 1)");
  add.operator()<float>(
      "--top-p", [p](float v) { p->set_top_p(v); }, "Smallest set of tokens with this probability");
  add.operator()<int32_t>(
      "--top-k", [p](int32_t v) { p->set_top_k(v); }, "The k likeliest tokens; 0 = off");
  add.operator()<float>(
      "--min-p", [p](float v) { p->set_min_p(v); }, "At least this share of the best probability");
  add.operator()<uint64_t>(
      "--seed", [p](uint64_t v) { p->set_seed(v); }, "Same seed, same text");
  add.operator()<float>(
      "--repetition-penalty", [p](float v) { p->set_repetition_penalty(v); }, "1 = off");
  add.operator()<float>(
      "--presence-penalty", [p](float v) { p->set_presence_penalty(v); }, "0 = off");
  add.operator()<float>(
      "--frequency-penalty", [p](float v) { p->set_frequency_penalty(v); }, "0 = off");
  app->add_option_function<std::vector<std::string>>(
         "--stop", [p](const auto& v) { p->mutable_stop()->Assign(v.begin(), v.end()); },
         "Text that ends the generation (repeatable)")
      ->allow_extra_args(false)
      ->group("Sampling");
  app->add_option_function<std::vector<uint32_t>>(
         "--stop-token-id", [p](const auto& v) { p->mutable_stop_token_ids()->Assign(v.begin(), v.end()); },
         "Token id that ends the generation (repeatable)")
      ->allow_extra_args(false)
      ->group("Sampling");
  app->add_option_function<std::vector<std::string>>(
         "--logit-bias",
         [p](const auto& v) {
           for (const std::string& text : v) SetLogitBias(text, p);
         },
         "TOKEN_ID:BIAS (repeatable)")
      ->allow_extra_args(false)
      ->group("Sampling");
  const auto flag = [app](const char* name, std::function<void()> set, const char* text) {
    app->add_flag_callback(name, std::move(set), text)->group("Sampling");
  };
  flag(
      "--ignore-eos", [p] { p->set_ignore_eos(true); }, "Go on after the model's end-of-text");
  flag(
      "--include-stop", [p] { p->set_include_stop_str_in_output(true); }, "Keep the stop text in the output");
  flag(
      "--show-special-tokens", [p] { p->set_skip_special_tokens(false); }, "Print special tokens too");
  app->add_option_function<int32_t>(
         "--priority", [request](int32_t v) { request->set_priority(v); }, "-100..100, larger runs first")
      ->group("Request");
  app->add_option_function<std::string>(
         "--cache-salt", [request](const std::string& v) { request->set_cache_salt(v); },
         "Share cached prefixes only with requests of the same salt")
      ->group("Request");
}

void AddPromptFlags(CLI::App* app, PromptFlags* flags) {
  app->add_option("prompt,--prompt", flags->text, "Text to continue; without it, stdin")
      ->each([flags](const std::string&) { flags->text_given = true; });
  app->add_option("--prompt-file", flags->file, "Read the prompt from a file, - for stdin");
  app->add_option("--token-ids", flags->ids, "Token ids as the prompt, like 0,17,4; used as they are");
  app->add_flag("--chat", flags->chat, "The prompt is a user's message: apply the model's chat template");
  app->add_option("--system", flags->system, "System message (with --chat)");
}

absl::Status SetInput(const PromptFlags& flags, const Console& console, v1::GenerateRequest* request) {
  const int sources = flags.text_given + !flags.file.empty() + !flags.ids.empty();
  if (sources > 1) return absl::InvalidArgumentError("give one of --prompt, --prompt-file and --token-ids");
  if (!flags.system.empty() && !flags.chat) return absl::InvalidArgumentError("--system needs --chat");
  if (!flags.ids.empty()) {
    if (flags.chat) return absl::InvalidArgumentError("--chat needs text, not --token-ids");
    return SetTokenIds(flags.ids, request->mutable_tokenized());
  }

  std::string text = flags.text;
  if (!flags.file.empty() && flags.file != "-") {
    NIBBLE_ASSIGN_OR_RETURN(text, ReadSmallFile(flags.file, kMaxPromptBytes));
  } else if (sources == 0 || flags.file == "-") {
    if (sources == 0 && console.in_is_terminal) {
      return absl::InvalidArgumentError("no prompt: give --prompt TEXT, --prompt-file FILE, or pipe text in");
    }
    text.assign(std::istreambuf_iterator<char>(console.in), {});
    if (text.size() > kMaxPromptBytes) {
      return absl::InvalidArgumentError(absl::StrCat("stdin has more than ", kMaxPromptBytes, " bytes"));
    }
  }
  NIBBLE_RETURN_IF_ERROR(CheckUtf8(text, "the prompt"));
  if (!flags.chat) {
    request->set_text(text);
    return absl::OkStatus();
  }
  NIBBLE_RETURN_IF_ERROR(CheckUtf8(flags.system, "--system"));
  v1::ChatMessages* chat = request->mutable_chat();
  if (!flags.system.empty()) {
    v1::ChatMessage* message = chat->add_messages();
    message->set_role("system");
    message->set_content(flags.system);
  }
  v1::ChatMessage* message = chat->add_messages();
  message->set_role("user");
  message->set_content(std::string(absl::StripSuffix(text, "\n")));
  return absl::OkStatus();
}

}  // namespace nibble
