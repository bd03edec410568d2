#include "tools/cli/chat.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <istream>
#include <ostream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/text/utf8.h"
#include "tools/cli/generation.h"
#include "tools/cli/request_flags.h"

namespace nibble {
namespace {

constexpr uint32_t kDefaultMaxTokens = 512;
constexpr char kHelp[] =
    "/system TEXT  set the system message\n"
    "/clear        forget the conversation\n"
    "/retry        answer the last message again\n"
    "/quit         end (Ctrl-D too); Ctrl-C stops an answer\n";

// What was said so far, in the form the model wants.
class Conversation {
 public:
  Conversation(bool chat_template, std::string system) : chat_template_(chat_template), system_(std::move(system)) {}

  void Say(std::string text) { Add("user", std::move(text)); }
  void Answer(std::string text) { Add("assistant", std::move(text)); }
  void Clear() { chat_.clear_messages(); }
  void set_system(std::string text) { system_ = std::move(text); }

  // Takes back the newest message and, when that was an answer, the message before it too; returns the user's one.
  std::string TakeBackLastExchange() {
    std::string said;
    while (said.empty() && !chat_.messages().empty()) {
      v1::ChatMessage* last = chat_.mutable_messages(chat_.messages_size() - 1);
      if (last->role() == "user") said = last->content();
      chat_.mutable_messages()->RemoveLast();
    }
    return said;
  }

  void FillInput(v1::GenerateRequest* request) const {
    if (chat_template_) {
      v1::ChatMessages* chat = request->mutable_chat();
      chat->clear_messages();
      if (!system_.empty()) {
        v1::ChatMessage* message = chat->add_messages();
        message->set_role("system");
        message->set_content(system_);
      }
      for (const v1::ChatMessage& message : chat_.messages()) *chat->add_messages() = message;
      return;
    }
    std::string text = system_.empty() ? "" : system_ + "\n";
    for (const v1::ChatMessage& message : chat_.messages()) text += message.content();
    request->set_text(std::move(text));
  }

 private:
  void Add(const char* role, std::string text) {
    v1::ChatMessage* message = chat_.add_messages();
    message->set_role(role);
    message->set_content(std::move(text));
  }

  const bool chat_template_;
  std::string system_;
  v1::ChatMessages chat_;
};

// Streams one answer; its text when the call succeeded or the user stopped it.
int AnswerOnce(v1::Inference::StubInterface* stub, const ChatFlags& flags, const Console& console, Interrupt* interrupt,
               Conversation* conversation) {
  v1::GenerateRequest request = flags.request;
  conversation->FillInput(&request);
  const Generation generation = RunGenerate(stub, request, {.deadline_s = flags.deadline_s, .interrupt = interrupt},
                                            [&console](const v1::GenerateResponse& response) {
                                              console.PrintText(response.text());
                                              return console.out.good();
                                            });
  const std::string& text = generation.sequences.front().text;
  if (text.empty() || text.back() != '\n') console.PrintText("\n");
  const bool stopped = interrupt != nullptr && interrupt->raised();
  if (generation.status.ok() || stopped) {
    conversation->Answer(text);
    if (stopped) interrupt->Clear();
    if (console.err_is_terminal) {
      console.err << console.Dim(GenerationSummary(generation) + (stopped ? " · stopped" : "")) << "\n" << std::endl;
    }
    return kExitOk;
  }
  conversation->TakeBackLastExchange();
  const RpcError error = ReadRpcError(generation.status);
  console.Error(FormatRpcError(error));
  return error.exit_code;
}

}  // namespace

void AddChatFlags(CLI::App* app, ChatFlags* flags) {
  app->add_option("--system", flags->system, "System message");
  AddSamplingFlags(app, &flags->request);
  flags->request.mutable_sampling_params()->set_max_tokens(kDefaultMaxTokens);
  app->add_option("--deadline", flags->deadline_s, "Seconds until an answer gives up")
      ->check(CLI::Range(1e-3, 1e9))
      ->group("Request");
}

int ChatCommand(v1::Inference::StubInterface* stub, ChatFlags flags, const Console& console, Interrupt* interrupt) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  v1::GetModelInfoResponse model;
  if (const grpc::Status status = stub->GetModelInfo(&context, {}, &model); !status.ok()) {
    const RpcError error = ReadRpcError(status);
    console.Error(FormatRpcError(error));
    return error.exit_code;
  }
  const bool interactive = console.in_is_terminal && console.err_is_terminal;
  if (interactive) {
    console.err << console.Dim(absl::StrCat("chatting with ", model.model_name(), " (", model.quantization(),
                                            "); /help for commands"))
                << std::endl;
  }
  if (!model.has_chat_template()) {
    console.err << console.Dim(absl::StrCat(model.model_name(),
                                            " has no chat template: it continues your text instead of answering"))
                << std::endl;
  }

  Conversation conversation(model.has_chat_template(), std::move(flags.system));
  std::string line;
  while (true) {
    if (interactive) console.err << "> " << std::flush;
    if (!std::getline(console.in, line)) break;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const std::string& message = line;
    if (message.empty()) continue;
    if (const size_t offset = ValidUtf8Prefix(message); offset < message.size()) {
      console.Error(absl::StrCat("the message is not valid UTF-8 at byte ", offset));
      if (!interactive) return kExitUsage;
      continue;
    }
    std::string said = message;
    if (message == "/quit" || message == "/exit") break;
    if (message == "/help") {
      console.err << kHelp << std::flush;
      continue;
    }
    if (message == "/clear") {
      conversation.Clear();
      continue;
    }
    if (absl::StartsWith(message, "/system ")) {
      conversation.set_system(message.substr(sizeof("/system ") - 1));
      continue;
    }
    if (message == "/retry") {
      said = conversation.TakeBackLastExchange();
      if (said.empty()) {
        console.Error("there is no message to answer again");
        continue;
      }
    } else if (absl::StartsWith(message, "/")) {
      console.Error(absl::StrCat("unknown command ", message, "; /help lists them"));
      continue;
    }
    conversation.Say(std::move(said));
    const int code = AnswerOnce(stub, flags, console, interrupt, &conversation);
    if (code != kExitOk && !interactive) return code;
    if (!console.out.good()) return kExitFailure;
  }
  if (interactive) console.err << std::endl;
  return kExitOk;
}

}  // namespace nibble
