#include "common/text/detokenizer.h"

#include "common/text/utf8.h"

namespace nibble {

Detokenizer::Detokenizer(const Tokenizer* tokenizer, DetokenizerOptions options)
    : tokenizer_(tokenizer), options_(options) {}

std::string_view Detokenizer::Append(uint32_t id) {
  if (options_.skip_special_tokens && tokenizer_->IsSpecial(id)) return {};
  const std::string_view bytes = tokenizer_->TokenBytes(id);
  if (pending_.empty() && tokenizer_->IsWholeUtf8(id)) return bytes;

  pending_ += bytes;
  text_.clear();
  const size_t tail = AppendUtf8Lossy(pending_, &text_);
  pending_.erase(0, pending_.size() - tail);
  return text_;
}

std::string_view Detokenizer::Finish() {
  if (pending_.empty()) return {};
  pending_.clear();
  return kReplacementCharacter;
}

}  // namespace nibble
