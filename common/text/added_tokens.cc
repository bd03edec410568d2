#include "common/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

// Where the white space that ends `text` begins.
size_t TrailingSpaceBegin(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0) {
    size_t at = begin - 1;
    while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
    if (!IsWhiteSpace(ReadUtf8(text.substr(at)).code_point)) break;
    begin = at;
  }
  return begin;
}

size_t LeadingSpaceBytes(std::string_view text) {
  size_t length = 0;
  while (length < text.size()) {
    const Utf8Step step = ReadUtf8(text.substr(length));
    if (!IsWhiteSpace(step.code_point)) break;
    length += step.length;
  }
  return length;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)), token_at_(1, -1) {
  for (size_t index = 0; index < tokens_.size(); ++index) {
    const std::string& content = tokens_[index].content;
    NIBBLE_CHECK(!content.empty() && content.size() <= kMaxAddedTokenBytes, content);
    begins_[static_cast<uint8_t>(content[0])] = true;
    uint32_t node = 0;
    for (const char c : content) {
      const auto [child, is_new] =
          children_.try_emplace(uint64_t{node} << 8 | static_cast<uint8_t>(c), static_cast<uint32_t>(token_at_.size()));
      if (is_new) token_at_.push_back(-1);
      node = child->second;
    }
    NIBBLE_CHECK(token_at_[node] < 0, content);
    token_at_[node] = static_cast<int32_t>(index);
  }
}

const AddedToken* AddedTokenMatcher::LongestAt(std::string_view text) const {
  const AddedToken* longest = nullptr;
  uint32_t node = 0;
  for (const char c : text) {
    const auto child = children_.find(uint64_t{node} << 8 | static_cast<uint8_t>(c));
    if (child == children_.end()) break;
    node = child->second;
    if (token_at_[node] >= 0) longest = &tokens_[token_at_[node]];
  }
  return longest;
}

// Follows find_matches in huggingface/tokenizers tokenizer/added_vocabulary.rs, including that a match which is not
// taken hides the tokens inside of it.
absl::Status AddedTokenMatcher::Split(std::string_view text, bool parse_special,
                                      absl::FunctionRef<absl::Status(std::string_view)> segment,
                                      absl::FunctionRef<void(uint32_t)> token) const {
  size_t done = 0;  // everything before has been handed out
  size_t at = 0;
  // The white space that rstrip went over last: not walked twice, should tokens themselves be white space.
  size_t space_begin = 1, space_end = 0;
  while (!tokens_.empty()) {
    while (at < text.size() && !begins_[static_cast<uint8_t>(text[at])]) ++at;
    if (at == text.size()) break;
    const AddedToken* match = LongestAt(text.substr(at));
    if (match == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + match->content.size();
    at = end;
    if (match->special && !parse_special) continue;
    // Never before `done`: white space there belongs to the previous token, and looking at it again would be quadratic.
    if (match->lstrip)
      begin = std::max(done, done <= begin ? done + TrailingSpaceBegin(text.substr(done, begin - done)) : begin);
    if (match->rstrip) {
      if (end < space_begin || end > space_end) {
        space_begin = end;
        space_end = end + LeadingSpaceBytes(text.substr(end));
      }
      end = space_end;
    }
    if (done < begin) NIBBLE_RETURN_IF_ERROR(segment(text.substr(done, begin - done)));
    token(match->id);
    done = end;
  }
  if (done < text.size()) NIBBLE_RETURN_IF_ERROR(segment(text.substr(done)));
  return absl::OkStatus();
}

}  // namespace nibble
