// The commands of `nibble` against an in-process service: what is printed where, what is sent, which exit code.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/tools/fake_inference.h"
#include "tools/cli/chat.h"
#include "tools/cli/generate.h"
#include "tools/cli/generation.h"
#include "tools/cli/status.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

struct Result {
  int exit_code = 0;
  std::string out, err;
  nlohmann::json json() const { return nlohmann::json::parse(out, nullptr, false); }
};

class CliTest : public ::testing::Test {
 protected:
  // Parses as main does, then runs against the fake service.
  Result Generate(std::vector<std::string> args, const std::string& input = "", bool terminal = false) {
    CLI::App app;
    GenerateFlags flags;
    AddGenerateFlags(&app, &flags);
    return Run(app, std::move(args), input, terminal,
               [&](const Console& console) { return GenerateCommand(stub_.get(), flags, console, nullptr); });
  }
  Result Chat(std::vector<std::string> args, const std::string& input) {
    CLI::App app;
    ChatFlags flags;
    AddChatFlags(&app, &flags);
    return Run(app, std::move(args), input, false,
               [&](const Console& console) { return ChatCommand(stub_.get(), flags, console, nullptr); });
  }
  Result Status(std::vector<std::string> args, bool terminal = false) {
    CLI::App app;
    StatusFlags flags;
    AddStatusFlags(&app, &flags);
    return Run(app, std::move(args), "", terminal,
               [&](const Console& console) { return StatusCommand(stub_.get(), flags, console, nullptr); });
  }

  testing::FakeInference service_;
  std::unique_ptr<v1::Inference::Stub> stub_ = service_.NewStub();

 private:
  template <typename Command>
  Result Run(CLI::App& app, std::vector<std::string> args, const std::string& input, bool terminal, Command command) {
    std::istringstream in(input);
    std::ostringstream out, err;
    const Console console{.in = in,
                          .out = out,
                          .err = err,
                          .in_is_terminal = terminal,
                          .out_is_terminal = terminal,
                          .err_is_terminal = terminal};
    std::reverse(args.begin(), args.end());  // CLI11 takes a stack
    Result result;
    try {
      app.parse(args);
      result.exit_code = command(console);
    } catch (const CLI::ParseError& error) {
      result.exit_code = app.exit(error, out, err) == 0 ? kExitOk : kExitUsage;
    }
    result.out = out.str();
    result.err = err.str();
    return result;
  }
};

TEST_F(CliTest, GenerateStreamsTextAndSummarizes) {
  const Result result = Generate({"--prompt", "Once", "--max-tokens", "4"});
  EXPECT_EQ(result.exit_code, kExitOk) << result.err;
  EXPECT_EQ(result.out, "w0 w1 w2 w3 \n");
  EXPECT_THAT(result.err, HasSubstr("4 tokens (1 prompt, 0 cached)"));
  EXPECT_THAT(result.err, HasSubstr("length"));
}

TEST_F(CliTest, PromptComesFromPositionStdinFileOrIds) {
  EXPECT_EQ(Generate({"Call me", "--max-tokens", "1"}).exit_code, kExitOk);
  EXPECT_EQ(service_.last_request().text(), "Call me");
  EXPECT_EQ(Generate({"--max-tokens", "1"}, "from a pipe\n").exit_code, kExitOk);
  EXPECT_EQ(service_.last_request().text(), "from a pipe\n");
  const std::string path = ::testing::TempDir() + "/nibble_cli_prompt.txt";
  std::ofstream(path) << "from a file";
  EXPECT_EQ(Generate({"--prompt-file", path, "--max-tokens", "1"}).exit_code, kExitOk);
  EXPECT_EQ(service_.last_request().text(), "from a file");
  EXPECT_EQ(Generate({"--token-ids", "0,17, 4", "--max-tokens", "1"}).exit_code, kExitOk);
  EXPECT_THAT(service_.last_request().tokenized().input_ids(), ElementsAre(0, 17, 4));
}

TEST_F(CliTest, EveryFlagReachesItsField) {
  const Result result = Generate({"--prompt",
                                  "x",
                                  "--max-tokens",
                                  "2",
                                  "--min-tokens",
                                  "1",
                                  "--temperature",
                                  "0.7",
                                  "--top-p",
                                  "0.9",
                                  "--top-k",
                                  "40",
                                  "--min-p",
                                  "0.05",
                                  "--seed",
                                  "7",
                                  "--repetition-penalty",
                                  "1.1",
                                  "--presence-penalty",
                                  "-0.5",
                                  "--frequency-penalty",
                                  "0.25",
                                  "--stop",
                                  "END",
                                  "--stop",
                                  "\n\n",
                                  "--stop-token-id",
                                  "9",
                                  "--logit-bias",
                                  "5:-2.5",
                                  "--ignore-eos",
                                  "--include-stop",
                                  "--show-special-tokens",
                                  "--priority",
                                  "-3",
                                  "--cache-salt",
                                  "tenant",
                                  "--request-id",
                                  "r-1",
                                  "-n",
                                  "2",
                                  "-q"});
  ASSERT_EQ(result.exit_code, kExitOk) << result.err;
  const v1::GenerateRequest request = service_.last_request();
  const v1::SamplingParams& p = request.sampling_params();
  EXPECT_EQ(p.max_tokens(), 2u);
  EXPECT_EQ(p.min_tokens(), 1u);
  EXPECT_FLOAT_EQ(p.temperature(), 0.7f);
  EXPECT_FLOAT_EQ(p.top_p(), 0.9f);
  EXPECT_EQ(p.top_k(), 40);
  EXPECT_FLOAT_EQ(p.min_p(), 0.05f);
  EXPECT_EQ(p.seed(), 7u);
  EXPECT_FLOAT_EQ(p.repetition_penalty(), 1.1f);
  EXPECT_FLOAT_EQ(p.presence_penalty(), -0.5f);
  EXPECT_FLOAT_EQ(p.frequency_penalty(), 0.25f);
  EXPECT_THAT(p.stop(), ElementsAre("END", "\n\n"));
  EXPECT_THAT(p.stop_token_ids(), ElementsAre(9u));
  EXPECT_FLOAT_EQ(p.logit_bias().at(5), -2.5f);
  EXPECT_TRUE(p.ignore_eos());
  EXPECT_TRUE(p.include_stop_str_in_output());
  EXPECT_TRUE(p.has_skip_special_tokens() && !p.skip_special_tokens());
  EXPECT_EQ(p.n(), 2u);
  EXPECT_EQ(request.priority(), -3);
  EXPECT_EQ(request.cache_salt(), "tenant");
  EXPECT_EQ(request.request_id(), "r-1");
  EXPECT_EQ(result.err, "");
}

TEST_F(CliTest, UnsetFlagsLeaveTheServersDefaults) {
  ASSERT_EQ(Generate({"--prompt", "x"}).exit_code, kExitOk);
  const v1::SamplingParams p = service_.last_request().sampling_params();
  EXPECT_FALSE(p.has_temperature() || p.has_top_p() || p.has_top_k() || p.has_seed() || p.has_n() || p.has_logprobs());
}

TEST_F(CliTest, ChatFlagSendsMessages) {
  ASSERT_EQ(Generate({"--chat", "--system", "Be brief", "--prompt", "Hi\n", "--max-tokens", "1"}).exit_code, kExitOk);
  const auto messages = service_.last_request().chat().messages();
  ASSERT_EQ(messages.size(), 2);
  EXPECT_EQ(messages[0].role(), "system");
  EXPECT_EQ(messages[0].content(), "Be brief");
  EXPECT_EQ(messages[1].role(), "user");
  EXPECT_EQ(messages[1].content(), "Hi");
}

TEST_F(CliTest, SeveralSequencesArePrintedOneAfterTheOther) {
  const Result result = Generate({"--prompt", "x", "--max-tokens", "2", "-n", "3"});
  EXPECT_EQ(result.out, "[0] w0 w1 \n[1] w0 w1 \n[2] w0 w1 \n");
}

TEST_F(CliTest, JsonHasTheDocumentedShape) {
  const Result result = Generate({"--prompt", "x", "--max-tokens", "3", "--logprobs", "2", "--json"});
  ASSERT_EQ(result.exit_code, kExitOk) << result.err;
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 1);
  const nlohmann::json json = result.json();
  ASSERT_TRUE(json.is_object()) << result.out;
  EXPECT_EQ(json["text"], "w0 w1 w2 ");
  EXPECT_EQ(json["token_ids"], (nlohmann::json{100, 101, 102}));
  ASSERT_EQ(json["logprobs"].size(), 3u);
  EXPECT_EQ(json["logprobs"][1]["token_id"], 101);
  EXPECT_FLOAT_EQ(json["logprobs"][1]["logprob"], -0.5f);
  EXPECT_EQ(json["logprobs"][1]["top"].size(), 2u);
  EXPECT_EQ(json["finish_reason"], "length");
  EXPECT_TRUE(json["matched_stop"].is_null());
  EXPECT_EQ(json["usage"]["prompt_tokens"], 1);
  EXPECT_EQ(json["usage"]["completion_tokens"], 3);
  EXPECT_EQ(json["usage"]["cached_tokens"], 0);
  EXPECT_EQ(json["request_id"], "fake-1");
  EXPECT_GT(json["timings"]["ttft_ms"].get<double>(), 0);
  EXPECT_GE(json["timings"]["e2e_ms"].get<double>(), json["timings"]["ttft_ms"].get<double>());
  EXPECT_TRUE(json["timings"].contains("tokens_per_second"));
  EXPECT_FALSE(json.contains("error"));
  EXPECT_FALSE(json.contains("choices"));
}

TEST_F(CliTest, JsonOfSeveralSequencesHasChoices) {
  const nlohmann::json json = Generate({"--prompt", "x", "--max-tokens", "1", "-n", "2", "--json"}).json();
  ASSERT_EQ(json["choices"].size(), 2u);
  EXPECT_EQ(json["choices"][1]["text"], "w0 ");
  EXPECT_EQ(json["text"], json["choices"][0]["text"]);
}

TEST_F(CliTest, RefusedRequestIsOneReadableLine) {
  const Result result = Generate({"--prompt", "refuse"});
  EXPECT_EQ(result.exit_code, kExitRefused);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("error: INVALID_ARGUMENT: "));
  EXPECT_THAT(result.err, HasSubstr("is 0, must be at least 1"));
  EXPECT_THAT(result.err, HasSubstr("sampling_params.max_tokens"));
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
}

TEST_F(CliTest, OverloadSaysWhenToTryAgain) {
  const Result result = Generate({"--prompt", "overload", "--json"});
  EXPECT_EQ(result.exit_code, kExitTryAgain);
  EXPECT_THAT(result.err, HasSubstr("RESOURCE_EXHAUSTED: the queue is full; try again in 0.5 s"));
  const nlohmann::json json = result.json();
  EXPECT_EQ(json["error"]["code"], "RESOURCE_EXHAUSTED");
  EXPECT_DOUBLE_EQ(json["error"]["retry_after_s"].get<double>(), 0.5);
  EXPECT_TRUE(json["finish_reason"].is_null());
}

TEST_F(CliTest, DeadlineEndsTheCallAndKeepsTheText) {
  const Result result = Generate({"--prompt", "hang", "--deadline", "0.2"});
  EXPECT_EQ(result.exit_code, kExitDeadline);
  EXPECT_EQ(result.out, "w0 w1 w2 \n");
  EXPECT_THAT(result.err, HasSubstr("DEADLINE_EXCEEDED"));
}

TEST_F(CliTest, UnreachableServerIsTryAgain) {
  stub_ = v1::Inference::NewStub(grpc::CreateChannel("127.0.0.1:1", grpc::InsecureChannelCredentials()));
  const Result result = Generate({"--prompt", "x"});
  EXPECT_EQ(result.exit_code, kExitTryAgain);
  EXPECT_THAT(result.err, HasSubstr("UNAVAILABLE"));
  EXPECT_EQ(Status({}).exit_code, kExitTryAgain);
}

TEST_F(CliTest, TerminalGetsNoEscapeSequencesFromTheModel) {
  const Result terminal = Generate({"--prompt", "escape", "--max-tokens", "1"}, "", /*terminal=*/true);
  EXPECT_THAT(terminal.out, HasSubstr("\xE2\x90\x9B[2Jred"));
  EXPECT_THAT(terminal.out, Not(HasSubstr("\x1b")));
  const Result pipe = Generate({"--prompt", "escape", "--max-tokens", "1"});
  EXPECT_EQ(pipe.out, "\x1b[2Jred\n");
}

TEST_F(CliTest, WrongCommandLinesSendNothing) {
  const std::vector<std::vector<std::string>> wrong = {
      {"--prompt", "x", "--no-such-flag"},
      {"--prompt", "x", "--max-tokens", "many"},
      {"--prompt", "x", "--max-tokens", "-1"},
      {"--prompt", "x", "--temperature", "hot"},
      {"--prompt", "x", "--token-ids", "1"},
      {"--token-ids", "1,two"},
      {"--token-ids", ","},
      {"--prompt", "x", "--system", "y"},
      {"--prompt", "x", "--logprobs", "3"},
      {"--prompt", "x", "--logit-bias", "5"},
      {"--prompt", "x", "--deadline", "-1"},
      {"--prompt", "x", "-n", "0"},
      {"--prompt", "\xff\xfe"},
      {"--prompt-file", "/no/such/file"},
  };
  for (const auto& args : wrong) {
    const Result result = Generate(args);
    EXPECT_EQ(result.exit_code, kExitUsage) << ::testing::PrintToString(args) << result.out;
    EXPECT_NE(result.err, "") << ::testing::PrintToString(args);
  }
  EXPECT_EQ(Generate({}, "", /*terminal=*/true).exit_code, kExitUsage);
  EXPECT_EQ(service_.generate_calls(), 0);
}

TEST_F(CliTest, ChatKeepsTheConversation) {
  const Result result = Chat({"--system", "Be brief", "--max-tokens", "2"}, "Hello\nAnd then?\n");
  EXPECT_EQ(result.exit_code, kExitOk) << result.err;
  EXPECT_EQ(result.out, "w0 w1 \nw0 w1 \n");
  std::vector<std::string> said;
  const v1::GenerateRequest request = service_.last_request();
  for (const auto& message : request.chat().messages()) {
    said.push_back(message.role() + ": " + message.content());
  }
  EXPECT_THAT(said, ElementsAre("system: Be brief", "user: Hello", "assistant: w0 w1 ", "user: And then?"));
}

TEST_F(CliTest, ChatCommandsClearAndRetry) {
  const Result result = Chat({"--max-tokens", "1"}, "one\n/clear\ntwo\n/retry\n/system S\n/quit\nnever\n");
  EXPECT_EQ(result.exit_code, kExitOk) << result.err;
  EXPECT_EQ(service_.generate_calls(), 3);
  ASSERT_EQ(service_.last_request().chat().messages_size(), 1);
  EXPECT_EQ(service_.last_request().chat().messages(0).content(), "two");
}

TEST_F(CliTest, ChatWithoutTemplateContinuesTheText) {
  service_.model.set_has_chat_template(false);
  const Result result = Chat({"--max-tokens", "1"}, "It was\na dark\n");
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(service_.last_request().text(), "It wasw0 a dark");
  EXPECT_THAT(result.err, HasSubstr("no chat template"));
}

TEST_F(CliTest, ChatInAPipeEndsWithTheErrorsCode) {
  const Result result = Chat({}, "overload\nnever\n");
  EXPECT_EQ(result.exit_code, kExitTryAgain);
  EXPECT_EQ(service_.generate_calls(), 1);
}

TEST_F(CliTest, StatusTableAndJson) {
  const Result table = Status({});
  EXPECT_EQ(table.exit_code, kExitOk) << table.err;
  EXPECT_THAT(table.out, HasSubstr("fake  w4a4kv4 · 4 layers · hidden 512 · context 4096"));
  EXPECT_THAT(table.out, HasSubstr("up 1:02 · 1 of 1 replicas ready"));
  EXPECT_THAT(table.out, HasSubstr("120/512"));
  EXPECT_THAT(table.out, HasSubstr("127.0.0.1:50061 127.0.0.1:50062"));
  EXPECT_THAT(table.out, Not(HasSubstr("\x1b")));

  const nlohmann::json json = Status({"--json"}).json();
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["ready"], true);
  EXPECT_EQ(json["model"]["model_name"], "fake");
  EXPECT_EQ(json["replicas"][0]["free_pages"], 392);
  EXPECT_EQ(json["replicas"][0]["workers"].size(), 2u);
}

TEST_F(CliTest, StatusWaitsUntilReady) {
  service_.status_calls_until_ready = 2;
  const Result result = Status({"--wait", "30"});
  EXPECT_EQ(result.exit_code, kExitOk) << result.err;
  EXPECT_THAT(result.err, HasSubstr("replica 0 loading"));
  EXPECT_THAT(result.err, HasSubstr("replica 0 ready"));
}

TEST_F(CliTest, StatusSaysWhyItIsNotReady) {
  service_.status_calls_until_ready = 1000000;
  const Result result = Status({"--wait", "0"});
  EXPECT_EQ(result.exit_code, kExitTryAgain);
  EXPECT_THAT(result.out, HasSubstr("last error: worker 127.0.0.1:1 refused the connection"));
  EXPECT_THAT(result.err, HasSubstr("not ready after 0 s"));
}

TEST_F(CliTest, CancelFromTheCallbackEndsTheCall) {
  v1::GenerateRequest request;
  request.set_text("hang");
  const Generation generation =
      RunGenerate(stub_.get(), request, {}, [](const v1::GenerateResponse&) { return false; });
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(generation.completion_tokens(), 1);
}

}  // namespace
}  // namespace nibble
