// Chat messages to the prompt of a Llama-3 instruct model, as token ids.
//
//   <|begin_of_text|>
//   <|start_header_id|>ROLE<|end_header_id|>\n\nCONTENT<|eot_id|>       for every message
//   <|start_header_id|>assistant<|end_header_id|>\n\n                   when the model shall answer
//
// Source of the layout: the chat_template of meta-llama/Meta-Llama-3-8B-Instruct (tokenizer_config.json). Control
// tokens stand only where this template puts them: a message that spells "<|eot_id|>" contains those ten characters,
// and cannot end its own turn.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/text/tokenizer.h"

namespace nibble {

struct ChatMessage {
  std::string role;     // "system", "user", "assistant", "tool" (which the template calls "ipython")
  std::string content;  // UTF-8; white space around it is dropped, as the template does
};

struct ChatOptions {
  bool add_generation_prompt = true;  // end with the header of the assistant's answer
};

// Immutable; usable from any number of threads.
class ChatTemplate {
 public:
  // FAILED_PRECONDITION when the tokenizer lacks one of the four control tokens, or has it as ordinary text.
  // `tokenizer` must outlive the result.
  static absl::StatusOr<ChatTemplate> Llama3(const Tokenizer* tokenizer);

  // INVALID_ARGUMENT for an empty conversation, more than kMaxMessages messages, an unknown role, or content that is
  // not UTF-8 (message index and byte offset).
  absl::StatusOr<std::vector<uint32_t>> Apply(std::span<const ChatMessage> messages, ChatOptions options = {}) const;

  // Ends the assistant's turn: add it to the stop ids of a chat request.
  uint32_t end_of_turn_id() const { return end_of_turn_; }

  static constexpr size_t kMaxMessages = 4096;

 private:
  explicit ChatTemplate(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}

  const Tokenizer* tokenizer_;
  uint32_t begin_of_text_ = 0;
  uint32_t start_header_ = 0;
  uint32_t end_header_ = 0;
  uint32_t end_of_turn_ = 0;
};

}  // namespace nibble
