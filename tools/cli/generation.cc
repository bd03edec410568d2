#include "tools/cli/generation.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kMaxSequences = 256;  // the server's limit is smaller; this one bounds the client's own memory

double MillisecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void Append(const v1::GenerateResponse& response, Generation* generation) {
  Generation::Sequence& sequence = generation->sequences[response.index()];
  sequence.text += response.text();
  sequence.token_ids.insert(sequence.token_ids.end(), response.token_ids().begin(), response.token_ids().end());
  sequence.logprobs.insert(sequence.logprobs.end(), response.logprobs().begin(), response.logprobs().end());
  if (response.has_finish()) sequence.finish = response.finish();
  if (generation->request_id.empty()) generation->request_id = response.request_id();
  if (!response.prompt_logprobs().empty()) {
    generation->prompt_logprobs.assign(response.prompt_logprobs().begin(), response.prompt_logprobs().end());
  }
}

nlohmann::json LogprobsJson(const std::vector<v1::TokenLogprobs>& logprobs) {
  nlohmann::json list = nlohmann::json::array();
  for (const v1::TokenLogprobs& entry : logprobs) {
    nlohmann::json top = nlohmann::json::array();
    for (int i = 0; i < entry.top_ids_size() && i < entry.top_logprobs_size(); ++i) {
      top.push_back({{"token_id", entry.top_ids(i)}, {"logprob", entry.top_logprobs(i)}});
    }
    list.push_back({{"token_id", entry.token_id()}, {"logprob", entry.logprob()}, {"top", std::move(top)}});
  }
  return list;
}

nlohmann::json SequenceJson(const Generation::Sequence& sequence) {
  nlohmann::json json = {{"text", sequence.text},    {"token_ids", sequence.token_ids}, {"logprobs", nullptr},
                         {"finish_reason", nullptr}, {"matched_stop", nullptr},         {"usage", nullptr}};
  if (!sequence.logprobs.empty()) json["logprobs"] = LogprobsJson(sequence.logprobs);
  if (!sequence.finish) return json;
  const v1::Finish& finish = *sequence.finish;
  json["finish_reason"] = FinishReasonName(finish.finish_reason());
  if (finish.has_matched_token_id()) json["matched_stop"] = finish.matched_token_id();
  if (finish.has_matched_stop_str()) json["matched_stop"] = finish.matched_stop_str();
  json["usage"] = {{"prompt_tokens", finish.usage().prompt_tokens()},
                   {"completion_tokens", finish.usage().completion_tokens()},
                   {"cached_tokens", finish.usage().cached_tokens()},
                   {"preemptions", finish.usage().preemptions()}};
  return json;
}

nlohmann::json OrNull(std::optional<double> value) { return value ? nlohmann::json(*value) : nlohmann::json(nullptr); }

}  // namespace

int64_t Generation::completion_tokens() const {
  int64_t tokens = 0;
  for (const Sequence& sequence : sequences) tokens += static_cast<int64_t>(sequence.token_ids.size());
  return tokens;
}

std::optional<double> Generation::tokens_per_second() const {
  const double decode_ms = ttft_ms ? e2e_ms - *ttft_ms : 0;
  if (completion_tokens() < 2 || decode_ms <= 0) return std::nullopt;
  return static_cast<double>(completion_tokens() - 1) / decode_ms * 1e3;
}

Generation RunGenerate(v1::Inference::StubInterface* stub, const v1::GenerateRequest& request,
                       const CallOptions& options,
                       const std::function<bool(const v1::GenerateResponse&)>& on_response) {
  Generation generation;
  const uint32_t n = request.sampling_params().has_n() ? request.sampling_params().n() : 1;
  generation.sequences.resize(std::clamp<uint32_t>(n, 1, kMaxSequences));

  grpc::ClientContext context;
  if (options.deadline_s) {
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::microseconds(static_cast<int64_t>(*options.deadline_s * 1e6)));
  }
  std::optional<Interrupt::Scope> cancel_on_signal;
  if (options.interrupt != nullptr) cancel_on_signal.emplace(options.interrupt, [&context] { context.TryCancel(); });

  const Clock::time_point start = Clock::now();
  const auto reader = stub->Generate(&context, request);
  v1::GenerateResponse response;
  grpc::Status client_error;
  while (reader->Read(&response)) {
    if (!client_error.ok()) continue;  // draining a call that was cancelled below
    if (response.index() >= generation.sequences.size()) {
      client_error = grpc::Status(grpc::StatusCode::INTERNAL,
                                  absl::StrCat("the server sent sequence index ", response.index(), ", only ",
                                               generation.sequences.size(), " were asked for"));
      context.TryCancel();
      continue;
    }
    if (!generation.ttft_ms && !response.token_ids().empty()) generation.ttft_ms = MillisecondsSince(start);
    Append(response, &generation);
    generation.e2e_ms = MillisecondsSince(start);
    if (on_response && !on_response(response)) {
      client_error = grpc::Status(grpc::StatusCode::CANCELLED, "cancelled by the client");
      context.TryCancel();
    }
  }
  generation.status = reader->Finish();
  if (!client_error.ok()) generation.status = client_error;
  if (generation.e2e_ms == 0) generation.e2e_ms = MillisecondsSince(start);
  return generation;
}

nlohmann::json GenerationJson(const Generation& generation) {
  nlohmann::json json = generation.sequences.empty() ? SequenceJson({}) : SequenceJson(generation.sequences.front());
  json["request_id"] = generation.request_id;
  json["prompt_logprobs"] =
      generation.prompt_logprobs.empty() ? nlohmann::json(nullptr) : LogprobsJson(generation.prompt_logprobs);
  const std::optional<double> rate = generation.tokens_per_second();
  json["timings"] = {{"ttft_ms", OrNull(generation.ttft_ms)},
                     {"e2e_ms", generation.e2e_ms},
                     {"tpot_ms", rate ? nlohmann::json(1e3 / *rate) : nlohmann::json(nullptr)},
                     {"tokens_per_second", OrNull(rate)}};
  if (generation.sequences.size() > 1) {
    json["choices"] = nlohmann::json::array();
    for (const Generation::Sequence& sequence : generation.sequences) json["choices"].push_back(SequenceJson(sequence));
  }
  if (!generation.status.ok()) json["error"] = RpcErrorJson(ReadRpcError(generation.status));
  return json;
}

const char* FinishReasonName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "";
  }
}

std::string GenerationSummary(const Generation& generation) {
  std::string line = absl::StrCat(generation.completion_tokens(), " tokens");
  const std::optional<v1::Finish>& finish = generation.sequences.front().finish;
  if (finish) {
    absl::StrAppend(&line, " (", finish->usage().prompt_tokens(), " prompt, ", finish->usage().cached_tokens(),
                    " cached)");
  }
  if (generation.ttft_ms) absl::StrAppendFormat(&line, " · first token %.0f ms", *generation.ttft_ms);
  if (generation.tokens_per_second()) {
    absl::StrAppendFormat(&line, " · %.0f tokens/s", *generation.tokens_per_second());
  }
  if (finish) absl::StrAppend(&line, " · ", FinishReasonName(finish->finish_reason()));
  if (finish && finish->usage().preemptions() > 0) {
    absl::StrAppend(&line, " · preempted ", finish->usage().preemptions(), "×");
  }
  return line;
}

}  // namespace nibble
