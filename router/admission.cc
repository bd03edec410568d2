#include "router/admission.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "google/rpc/error_details.pb.h"

namespace nibble {
namespace {

// Collects violations; at most one per field, so that a hostile request cannot make a huge error.
class Violations {
 public:
  template <typename... Parts>
  void Add(std::string_view field, const Parts&... description) {
    list_.push_back({std::string(field), absl::StrCat(description...)});
  }

  // low ≤ value ≤ high; `low_open` leaves low itself out. NaN is never inside.
  void Range(std::string_view field, float value, float low, float high, bool low_open = false) {
    if ((low_open ? value > low : value >= low) && value <= high) return;
    Add(field, "is ", value, ", must be in ", low_open ? "(" : "[", low, ", ", high, "]");
  }
  void Range(std::string_view field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) Add(field, "is ", value, ", must be in [", low, ", ", high, "]");
  }
  void AtMost(std::string_view field, uint64_t count, const char* unit, uint64_t limit) {
    if (count > limit) Add(field, "has ", count, " ", unit, ", the limit is ", limit);
  }

  std::vector<FieldViolation> Take() { return std::move(list_); }

 private:
  std::vector<FieldViolation> list_;
};

bool IsRequestIdCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
         c == ':' || c == '-';
}

void CheckInput(const v1::GenerateRequest& request, const AdmitLimits& limits, Violations* v) {
  switch (request.input_case()) {
    case v1::GenerateRequest::kText:
      if (request.text().empty()) v->Add("text", "is empty, must have at least one character");
      break;
    case v1::GenerateRequest::kTokenized:
      if (request.tokenized().input_ids().empty()) v->Add("tokenized.input_ids", "is empty, must have at least one id");
      break;
    case v1::GenerateRequest::kChat: {
      const auto& messages = request.chat().messages();
      if (messages.empty()) v->Add("chat.messages", "is empty, must have at least one message");
      v->AtMost("chat.messages", messages.size(), "messages", limits.max_chat_messages);
      for (int i = 0; i < messages.size(); ++i) {
        const std::string& role = messages[i].role();
        if (role == "system" || role == "user" || role == "assistant") continue;
        v->Add(absl::StrCat("chat.messages[", i, "].role"), "is \"", absl::CHexEscape(role.substr(0, 32)),
               "\", must be system, user or assistant");
        break;
      }
      break;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      v->Add("input", "is missing, must be one of text, tokenized, chat");
      break;
  }
}

void CheckSampling(const v1::SamplingParams& s, const AdmitModel& model, const AdmitLimits& limits, Violations* v) {
  const auto name = [](const char* field) { return absl::StrCat("sampling_params.", field); };
  if (s.has_temperature()) v->Range(name("temperature"), s.temperature(), 0, limits.max_temperature);
  if (s.has_top_p()) v->Range(name("top_p"), s.top_p(), 0, 1, /*low_open=*/true);
  if (s.has_top_k() && s.top_k() < -1) v->Add(name("top_k"), "is ", s.top_k(), ", must be -1 or 0 (off) or positive");
  v->Range(name("min_p"), s.min_p(), 0, 1);
  v->Range(name("frequency_penalty"), s.frequency_penalty(), -limits.max_penalty, limits.max_penalty);
  v->Range(name("presence_penalty"), s.presence_penalty(), -limits.max_penalty, limits.max_penalty);
  if (s.has_repetition_penalty()) {
    v->Range(name("repetition_penalty"), s.repetition_penalty(), 0, limits.max_repetition_penalty, /*low_open=*/true);
  }
  if (s.has_max_tokens() && (s.max_tokens() == 0 || s.max_tokens() > model.max_context_length)) {
    v->Add(name("max_tokens"), "is ", s.max_tokens(), ", must be 1 to the context length, ", model.max_context_length);
  }
  if (s.has_max_tokens() && s.min_tokens() > s.max_tokens()) {
    v->Add(name("min_tokens"), "is ", s.min_tokens(), ", must be at most max_tokens, which is ", s.max_tokens());
  }
  v->AtMost(name("stop"), s.stop_size(), "strings", limits.max_stop_strings);
  for (int i = 0; i < s.stop_size(); ++i) {
    const size_t bytes = s.stop(i).size();
    if (bytes >= 1 && bytes <= limits.max_stop_string_bytes) continue;
    v->Add(absl::StrCat("sampling_params.stop[", i, "]"), "has ", bytes, " bytes, must have 1 to ",
           limits.max_stop_string_bytes);
    break;
  }
  v->AtMost(name("stop_token_ids"), s.stop_token_ids_size(), "ids", limits.max_stop_ids);
  for (int i = 0; i < s.stop_token_ids_size(); ++i) {
    if (s.stop_token_ids(i) < model.vocab_size) continue;
    v->Add(absl::StrCat("sampling_params.stop_token_ids[", i, "]"), "is ", s.stop_token_ids(i),
           ", must be below the vocabulary size ", model.vocab_size);
    break;
  }
  if (s.has_n()) v->Range(name("n"), int64_t{s.n()}, 1, limits.max_n);
  if (s.has_logprobs()) v->Range(name("logprobs"), int64_t{s.logprobs()}, 0, limits.max_logprobs);
  if (s.has_prompt_logprobs()) v->Range(name("prompt_logprobs"), int64_t{s.prompt_logprobs()}, 0, limits.max_logprobs);
  v->AtMost(name("logit_bias"), s.logit_bias_size(), "entries", limits.max_logit_bias_entries);
  for (const auto& [id, bias] : s.logit_bias()) {
    if (id >= model.vocab_size) {
      v->Add(name("logit_bias"), "has token id ", id, ", must be below the vocabulary size ", model.vocab_size);
      break;
    }
    if (!(std::fabs(bias) <= limits.max_logit_bias)) {
      v->Add(name("logit_bias"), "of token ", id, " is ", bias, ", must be in [", -limits.max_logit_bias, ", ",
             limits.max_logit_bias, "]");
      break;
    }
  }
}

void CheckPrompt(const v1::GenerateRequest& request, const std::vector<uint32_t>& ids, const AdmitModel& model,
                 Violations* v) {
  const char* field = request.has_tokenized() ? "tokenized.input_ids" : request.has_chat() ? "chat" : "text";
  if (ids.empty()) {
    if (!request.has_tokenized()) v->Add(field, "has no tokens, must have at least one");
    return;
  }
  if (ids.size() >= model.max_context_length) {
    v->Add(field, "has ", ids.size(), " tokens, the limit is ", model.max_context_length - 1, ": the context of ",
           model.max_context_length, " tokens minus one of output");
    return;
  }
  const auto unknown = std::find_if(ids.begin(), ids.end(), [&](uint32_t id) { return id >= model.vocab_size; });
  if (unknown != ids.end()) {
    v->Add(absl::StrCat(field, "[", unknown - ids.begin(), "]"), "is ", *unknown,
           ", must be below the vocabulary size ", model.vocab_size);
  }
  const uint64_t room = model.max_context_length - ids.size();
  const v1::SamplingParams& s = request.sampling_params();
  if (s.min_tokens() > room) {
    v->Add("sampling_params.min_tokens", "is ", s.min_tokens(), ", must be at most ", room, ": the context of ",
           model.max_context_length, " tokens minus ", ids.size(), " of prompt");
  }
}

void CheckFields(const v1::GenerateRequest& request, const AdmitModel& model, const AdmitLimits& limits,
                 Violations* v) {
  const std::string& id = request.request_id();
  v->AtMost("request_id", id.size(), "bytes", limits.max_request_id_bytes);
  if (!std::all_of(id.begin(), id.end(), IsRequestIdCharacter)) {
    v->Add("request_id", "is \"", absl::CHexEscape(id.substr(0, limits.max_request_id_bytes)),
           "\", may hold only [A-Za-z0-9._:-]");
  }
  CheckInput(request, limits, v);
  CheckSampling(request.sampling_params(), model, limits, v);
  v->Range("priority", int64_t{request.priority()}, -int64_t{limits.max_priority}, int64_t{limits.max_priority});
  v->AtMost("cache_salt", request.cache_salt().size(), "bytes", limits.max_cache_salt_bytes);
}

// Every field meant as it is: absent ones get their defaults, equivalent values one form.
v1::StepSampling Resolve(const v1::SamplingParams& s, const AdmitModel& model, const std::vector<uint32_t>& stop_ids) {
  v1::StepSampling sampling;
  const float temperature = s.has_temperature() ? s.temperature() : 1.0f;
  sampling.set_temperature(temperature < kSmallestTemperature ? 0.0f : temperature);
  sampling.set_top_p(s.has_top_p() ? s.top_p() : 1.0f);
  const uint32_t top_k = s.top_k() <= 0 ? 0 : static_cast<uint32_t>(s.top_k());
  sampling.set_top_k(top_k >= model.vocab_size ? 0 : top_k);
  sampling.set_min_p(s.min_p());
  sampling.set_repetition_penalty(s.has_repetition_penalty() ? s.repetition_penalty() : 1.0f);
  sampling.set_presence_penalty(s.presence_penalty());
  sampling.set_frequency_penalty(s.frequency_penalty());
  sampling.set_logprobs(s.has_logprobs());
  sampling.set_num_top_logprobs(s.logprobs());
  sampling.set_prompt_logprobs(s.has_prompt_logprobs());
  sampling.set_num_top_prompt_logprobs(s.prompt_logprobs());
  if (s.min_tokens() > 0) {
    sampling.set_min_tokens(s.min_tokens());
    sampling.mutable_suppressed_ids()->Add(stop_ids.begin(), stop_ids.end());
  }
  std::vector<std::pair<uint32_t, float>> bias(s.logit_bias().begin(), s.logit_bias().end());
  std::sort(bias.begin(), bias.end());  // map order is not deterministic, plans are
  for (const auto& [id, value] : bias) {
    sampling.add_bias_ids(id);
    sampling.add_bias_values(value);
  }
  return sampling;
}

}  // namespace

std::vector<FieldViolation> CheckRequest(const v1::GenerateRequest& request, const AdmitModel& model,
                                         const AdmitLimits& limits) {
  Violations violations;
  CheckFields(request, model, limits, &violations);
  return violations.Take();
}

absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> Admit(const v1::GenerateRequest& request,
                                                             std::vector<uint32_t> prompt_token_ids,
                                                             const AdmitModel& model, const AdmitLimits& limits,
                                                             absl::FunctionRef<uint64_t()> random_seed) {
  NIBBLE_CHECK_GE(model.max_context_length, 2u);
  Violations violations;
  CheckFields(request, model, limits, &violations);
  CheckPrompt(request, prompt_token_ids, model, &violations);
  if (absl::Status status = InvalidRequest(violations.Take()); !status.ok()) return status;

  const v1::SamplingParams& s = request.sampling_params();
  std::vector<uint32_t> stop_ids(s.stop_token_ids().begin(), s.stop_token_ids().end());
  if (!s.ignore_eos()) stop_ids.insert(stop_ids.end(), model.eos_token_ids.begin(), model.eos_token_ids.end());
  std::sort(stop_ids.begin(), stop_ids.end());
  stop_ids.erase(std::unique(stop_ids.begin(), stop_ids.end()), stop_ids.end());

  const uint32_t num_prompt_tokens = static_cast<uint32_t>(prompt_token_ids.size());
  const uint32_t room = model.max_context_length - num_prompt_tokens;
  const v1::StepSampling sampling = Resolve(s, model, stop_ids);
  const uint64_t seed = s.has_seed() ? s.seed() : random_seed();
  const uint32_t n = s.has_n() ? s.n() : 1;

  std::vector<std::unique_ptr<Sequence>> sequences;
  for (uint32_t i = 0; i < n; ++i) {
    auto sequence = std::make_unique<Sequence>();
    sequence->index = i;
    sequence->num_prompt_tokens = num_prompt_tokens;
    sequence->max_tokens = s.has_max_tokens() ? std::min(s.max_tokens(), room) : room;
    sequence->max_tokens_open = !s.has_max_tokens();
    sequence->min_tokens = s.min_tokens();
    sequence->stop_ids.assign(stop_ids.begin(), stop_ids.end());
    sequence->sampling = sampling;
    sequence->sampling.set_seed(seed + i);
    sequence->priority = request.priority();
    sequence->cache_salt = request.cache_salt();
    sequence->use_prefix_cache = !s.has_prompt_logprobs();
    if (i + 1 < n) {
      sequence->token_ids = prompt_token_ids;
    } else {
      sequence->token_ids = std::move(prompt_token_ids);
    }
    sequences.push_back(std::move(sequence));
  }
  return sequences;
}

absl::Status InvalidRequest(const std::vector<FieldViolation>& violations) {
  if (violations.empty()) return absl::OkStatus();
  std::string message;
  google::rpc::BadRequest details;
  for (const FieldViolation& violation : violations) {
    absl::StrAppend(&message, message.empty() ? "" : "; ", violation.field, " ", violation.description);
    auto* entry = details.add_field_violations();
    entry->set_field(violation.field);
    entry->set_description(violation.description);
  }
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kBadRequestTypeUrl, absl::Cord(details.SerializeAsString()));
  return status;
}

}  // namespace nibble
