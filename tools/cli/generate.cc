#include "tools/cli/generate.h"

#include <CLI/CLI.hpp>
#include <ostream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tools/cli/generation.h"

namespace nibble {
namespace {

constexpr uint32_t kDefaultMaxTokens = 256;  // the server's default is the whole context: long for a terminal

// Streams sequence 0 as it comes; the others wait for their turn, so that n texts do not run into each other.
class TextPrinter {
 public:
  TextPrinter(const Console& console, uint32_t n) : console_(console), n_(n), pending_(n), finished_(n) {}

  // False when the output is closed (`| head`): there is nobody left to generate for.
  bool Add(const v1::GenerateResponse& response) {
    pending_[response.index()] += response.text();
    if (response.has_finish()) finished_[response.index()] = true;
    Flush();
    return console_.out.good();
  }

  // Prints what a broken stream left behind.
  void Finish() {
    while (current_ < n_) {
      PrintPending();
      Next();
    }
  }

 private:
  void Flush() {
    while (current_ < n_) {
      PrintPending();
      if (!finished_[current_]) return;
      Next();
    }
  }

  void PrintPending() {
    std::string text = std::exchange(pending_[current_], {});
    if (text.empty()) return;
    if (n_ > 1 && !started_) console_.PrintText(absl::StrCat("[", current_, "] "));
    started_ = true;
    last_ = text.back();
    console_.PrintText(text);
  }

  void Next() {
    if (last_ != '\n') console_.PrintText("\n");
    last_ = '\0';
    started_ = false;
    ++current_;
  }

  const Console& console_;
  const uint32_t n_;
  std::vector<std::string> pending_;
  std::vector<bool> finished_;
  uint32_t current_ = 0;
  bool started_ = false;
  char last_ = '\0';
};

int PrintJson(const Generation& generation, const Console& console) {
  // A server's error text may hold any bytes; they become U+FFFD rather than an exception.
  console.out << GenerationJson(generation).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
  return console.out.good() ? kExitOk : kExitFailure;
}

// One readable line; returns the exit code.
int PrintFailure(const grpc::Status& status, const Console& console, const Interrupt* interrupt) {
  if (interrupt != nullptr && interrupt->raised()) {
    console.Error("interrupted; the request was cancelled");
    return kExitInterrupted;
  }
  const RpcError error = ReadRpcError(status);
  console.Error(FormatRpcError(error));
  return error.exit_code;
}

}  // namespace

void AddGenerateFlags(CLI::App* app, GenerateFlags* flags) {
  AddPromptFlags(app, &flags->prompt);
  AddSamplingFlags(app, &flags->request);
  v1::GenerateRequest* request = &flags->request;
  v1::SamplingParams* params = request->mutable_sampling_params();
  params->set_max_tokens(kDefaultMaxTokens);
  app->add_option_function<uint32_t>(
         "--n,-n", [params](uint32_t v) { params->set_n(v); }, "Sequences to generate from the prompt")
      ->check(CLI::Range(1, 256))
      ->group("Sampling");
  app->add_option_function<uint32_t>(
         "--logprobs", [params](uint32_t v) { params->set_logprobs(v); }, "Log-probabilities and the k best (--json)")
      ->group("Sampling");
  app->add_option_function<uint32_t>(
         "--prompt-logprobs", [params](uint32_t v) { params->set_prompt_logprobs(v); },
         "The same for the prompt (--json)")
      ->group("Sampling");
  app->add_option_function<std::string>(
         "--request-id", [request](const std::string& v) { request->set_request_id(v); }, "Name of the request in logs")
      ->group("Request");
  app->add_option("--deadline", flags->deadline_s, "Seconds until the request gives up")
      ->check(CLI::Range(1e-3, 1e9))
      ->group("Request");
  app->add_flag("--json", flags->json, "Print one JSON object at the end instead of text");
  app->add_flag("--echo", flags->echo, "Print the prompt in front of its continuation");
  app->add_flag("-q,--quiet", flags->quiet, "No summary line");
}

int GenerateCommand(v1::Inference::StubInterface* stub, GenerateFlags flags, const Console& console,
                    Interrupt* interrupt) {
  const v1::SamplingParams& params = flags.request.sampling_params();
  if (!flags.json && (params.has_logprobs() || params.has_prompt_logprobs())) {
    console.Error("--logprobs and --prompt-logprobs need --json");
    return kExitUsage;
  }
  if (const absl::Status status = SetInput(flags.prompt, console, &flags.request); !status.ok()) {
    console.Error(std::string(status.message()));
    return kExitUsage;
  }

  const CallOptions options{.deadline_s = flags.deadline_s, .interrupt = interrupt};
  if (flags.json) {
    const Generation generation = RunGenerate(stub, flags.request, options);
    const int printed = PrintJson(generation, console);
    return generation.status.ok() ? printed : PrintFailure(generation.status, console, interrupt);
  }

  TextPrinter printer(console, params.has_n() ? params.n() : 1);
  if (flags.echo && flags.request.has_text()) console.PrintText(flags.request.text());
  const Generation generation = RunGenerate(
      stub, flags.request, options, [&printer](const v1::GenerateResponse& response) { return printer.Add(response); });
  if (generation.status.ok() || generation.completion_tokens() > 0) printer.Finish();
  if (!console.out.good()) return kExitOk;  // the reader of our pipe has seen enough
  if (!generation.status.ok()) return PrintFailure(generation.status, console, interrupt);
  if (!flags.quiet) console.err << console.Dim(GenerationSummary(generation)) << std::endl;
  return kExitOk;
}

}  // namespace nibble
