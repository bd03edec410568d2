#include "router/intake.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "router/admission.h"

namespace nibble {
namespace {

uint64_t RandomSeed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

size_t ChatBytes(const v1::ChatMessages& chat) {
  size_t bytes = 0;
  for (const v1::ChatMessage& message : chat.messages()) bytes += message.content().size() + message.role().size();
  return bytes;
}

absl::Status InvalidField(const std::string& field, const absl::Status& status) {
  if (!absl::IsInvalidArgument(status)) return Annotate(status, field);
  return InvalidRequest({{field, std::string(status.message())}});
}

}  // namespace

Intake::Intake(const Tokenizer* tokenizer, std::optional<ChatTemplate> chat_template, uint32_t vocab_size,
               uint32_t max_context_length, std::vector<uint32_t> eos_token_ids)
    : tokenizer_(tokenizer),
      chat_template_(std::move(chat_template)),
      vocab_size_(vocab_size),
      max_context_length_(max_context_length),
      eos_token_ids_(std::move(eos_token_ids)) {
  for (uint32_t id = 0; id < tokenizer_->vocab_size(); ++id) {
    longest_token_bytes_ = std::max(longest_token_bytes_, tokenizer_->TokenBytes(id).size());
  }
}

absl::Status Intake::Check(const v1::GenerateRequest& request) const {
  const AdmitModel model{vocab_size_, max_context_length_, {}};
  NIBBLE_RETURN_IF_ERROR(InvalidRequest(CheckRequest(request, model, AdmitLimits{})));
  if (request.has_chat() && !chat_template_.has_value()) {
    return absl::FailedPreconditionError("chat is not available: the model's tokenizer lacks Llama-3's control tokens");
  }
  return request.has_tokenized() ? absl::OkStatus()
                                 : CheckLength(request.has_chat() ? "chat" : "text", InputBytes(request));
}

// What is too long whatever the tokenizer makes of it is not encoded to find that out.
absl::Status Intake::CheckLength(const char* field, size_t bytes) const {
  const size_t limit = longest_token_bytes_ * max_context_length_;
  if (bytes <= limit) return absl::OkStatus();
  return InvalidRequest({{field, absl::StrCat("has ", bytes, " bytes, more than ", max_context_length_,
                                              " tokens (context length) can hold")}});
}

absl::StatusOr<std::vector<uint32_t>> Intake::EncodeText(const std::string& text, bool add_special_tokens) const {
  auto ids = tokenizer_->Encode(text, {.add_special_tokens = add_special_tokens});
  if (!ids.ok()) return InvalidField("text", ids.status());
  return ids;
}

absl::StatusOr<std::vector<uint32_t>> Intake::EncodeChat(const v1::ChatMessages& chat) const {
  if (!chat_template_.has_value()) {
    return absl::FailedPreconditionError("chat is not available: the model's tokenizer lacks Llama-3's control tokens");
  }
  std::vector<ChatMessage> messages;
  for (const v1::ChatMessage& message : chat.messages()) messages.push_back({message.role(), message.content()});
  auto ids = chat_template_->Apply(messages);
  if (!ids.ok()) return InvalidField("chat", ids.status());
  return ids;
}

absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> Intake::Admit(const v1::GenerateRequest& request) const {
  AdmitModel model{vocab_size_, max_context_length_, eos_token_ids_};
  std::vector<uint32_t> ids;
  if (request.has_tokenized()) {
    ids.assign(request.tokenized().input_ids().begin(), request.tokenized().input_ids().end());
  } else if (request.has_chat()) {
    NIBBLE_ASSIGN_OR_RETURN(ids, EncodeChat(request.chat()));
    model.eos_token_ids.push_back(chat_template_->end_of_turn_id());
  } else {
    NIBBLE_ASSIGN_OR_RETURN(ids, EncodeText(request.text(), true));
  }
  return nibble::Admit(request, std::move(ids), model, AdmitLimits{}, RandomSeed);
}

absl::StatusOr<std::vector<uint32_t>> Intake::Encode(const v1::TokenizeRequest& request) const {
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText:
      return EncodeText(request.text(), !request.has_add_special_tokens() || request.add_special_tokens());
    case v1::TokenizeRequest::kChat:
      return EncodeChat(request.chat());
    case v1::TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return InvalidRequest({{"input", "is missing, must be one of text, chat"}});
}

absl::StatusOr<std::string> Intake::Decode(const v1::DetokenizeRequest& request) const {
  const auto& ids = request.input_ids();
  auto text = tokenizer_->Decode({ids.data(), static_cast<size_t>(ids.size())},
                                 !request.has_skip_special_tokens() || request.skip_special_tokens());
  if (!text.ok()) return InvalidField("input_ids", text.status());
  return text;
}

size_t Intake::InputBytes(const v1::GenerateRequest& request) {
  return request.has_chat() ? ChatBytes(request.chat()) : request.text().size();
}

size_t Intake::InputBytes(const v1::TokenizeRequest& request) {
  return request.has_chat() ? ChatBytes(request.chat()) : request.text().size();
}

}  // namespace nibble
