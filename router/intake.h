// A client's request on its way in: checked, turned into token ids, admitted. No gRPC, no state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/text/chat_template.h"
#include "common/text/tokenizer.h"
#include "nibble/v1/inference.pb.h"
#include "router/sequence.h"

namespace nibble {

// Usable from any number of threads.
class Intake {
 public:
  // `tokenizer` outlives it. Without a chat template chat requests are FAILED_PRECONDITION.
  Intake(const Tokenizer* tokenizer, std::optional<ChatTemplate> chat_template, uint32_t vocab_size,
         uint32_t max_context_length, std::vector<uint32_t> eos_token_ids);

  // Every violation that needs no tokens. INVALID_ARGUMENT.
  absl::Status Check(const v1::GenerateRequest& request) const;

  // Encodes the input (costs CPU in proportion to its bytes) and admits it: the request's n sequences, all but id,
  // arrival, output, deadline and times.
  absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> Admit(const v1::GenerateRequest& request) const;

  absl::StatusOr<std::vector<uint32_t>> Encode(const v1::TokenizeRequest& request) const;
  absl::StatusOr<std::string> Decode(const v1::DetokenizeRequest& request) const;

  bool has_chat_template() const { return chat_template_.has_value(); }
  // Text bytes to encode. Decides whether a callback thread may do it.
  static size_t InputBytes(const v1::GenerateRequest& request);
  static size_t InputBytes(const v1::TokenizeRequest& request);

 private:
  absl::Status CheckLength(const char* field, size_t bytes) const;
  absl::StatusOr<std::vector<uint32_t>> EncodeText(const std::string& text, bool add_special_tokens) const;
  absl::StatusOr<std::vector<uint32_t>> EncodeChat(const v1::ChatMessages& chat) const;

  const Tokenizer* const tokenizer_;
  const std::optional<ChatTemplate> chat_template_;
  const uint32_t vocab_size_;
  const uint32_t max_context_length_;
  const std::vector<uint32_t> eos_token_ids_;
  size_t longest_token_bytes_ = 1;
};

}  // namespace nibble
