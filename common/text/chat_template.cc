#include "common/text/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "common/base/status.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

// Role of a message -> what the header says.
constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kRoles = {
    {{"system", "system"}, {"user", "user"}, {"assistant", "assistant"}, {"tool", "ipython"}}};

// What Jinja's trim, Python's str.strip, drops: White_Space and the four information separators.
bool IsTrimmed(char32_t c) { return IsWhiteSpace(c) || (c >= 0x1C && c <= 0x1F); }

// `text` is valid UTF-8.
std::string_view Trim(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step first = ReadUtf8(text);
    if (!IsTrimmed(first.code_point)) break;
    text.remove_prefix(first.length);
  }
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) --last;
    if (!IsTrimmed(ReadUtf8(text.substr(last)).code_point)) break;
    text = text.substr(0, last);
  }
  return text;
}

}  // namespace

absl::StatusOr<ChatTemplate> ChatTemplate::Llama3(const Tokenizer* tokenizer) {
  ChatTemplate result(tokenizer);
  const std::array<std::pair<std::string_view, uint32_t*>, 4> controls = {
      {{"<|begin_of_text|>", &result.begin_of_text_},
       {"<|start_header_id|>", &result.start_header_},
       {"<|end_header_id|>", &result.end_header_},
       {"<|eot_id|>", &result.end_of_turn_}}};
  for (const auto& [name, id] : controls) {
    const std::optional<uint32_t> found = tokenizer->TokenToId(name);
    if (!found || !tokenizer->IsSpecial(*found))
      return absl::FailedPreconditionError(
          fmt::format("the model's tokenizer has no special token {}, which the Llama-3 chat template needs", name));
    *id = *found;
  }
  return result;
}

absl::StatusOr<std::vector<uint32_t>> ChatTemplate::Apply(std::span<const ChatMessage> messages,
                                                          ChatOptions options) const {
  if (messages.empty() || messages.size() > kMaxMessages)
    return absl::InvalidArgumentError(
        fmt::format("messages has {} entries, must have 1..{}", messages.size(), kMaxMessages));

  std::vector<uint32_t> ids = {begin_of_text_};
  const auto append_text = [&](std::string_view text) -> absl::Status {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<uint32_t> encoded,
                            tokenizer_->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false}));
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    return absl::OkStatus();
  };
  const auto append_header = [&](std::string_view role) -> absl::Status {
    ids.push_back(start_header_);
    NIBBLE_RETURN_IF_ERROR(append_text(role));
    ids.push_back(end_header_);
    return absl::OkStatus();
  };

  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const auto role =
        std::find_if(kRoles.begin(), kRoles.end(), [&](const auto& known) { return known.first == message.role; });
    if (role == kRoles.end())
      return absl::InvalidArgumentError(fmt::format(
          "messages[{}].role is \"{}\", must be system, user, assistant or tool", i, Excerpt(message.role)));
    if (const size_t valid = ValidUtf8Prefix(message.content); valid != message.content.size())
      return absl::InvalidArgumentError(fmt::format("messages[{}].content is not valid UTF-8 at byte {}", i, valid));
    NIBBLE_RETURN_IF_ERROR(append_header(role->second));
    // One text, as the reference encodes it: the words of the line feeds and of the content may touch.
    const absl::Status status = append_text(fmt::format("\n\n{}", Trim(message.content)));
    if (!status.ok()) return Annotate(status, fmt::format("messages[{}].content", i));
    ids.push_back(end_of_turn_);
  }
  if (options.add_generation_prompt) {
    NIBBLE_RETURN_IF_ERROR(append_header("assistant"));
    NIBBLE_RETURN_IF_ERROR(append_text("\n\n"));
  }
  return ids;
}

}  // namespace nibble
