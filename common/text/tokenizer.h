// Text to token ids and back, as the model's own tokenizer.json (Hugging Face `tokenizers` format) defines it:
// byte-level BPE of the GPT-2, Llama-3 and Qwen2 kind. docs/text.md is the contract: what is supported, what is
// refused.
//
// Immutable after loading: every const member may be called from any number of threads at once, without locks.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

struct EncodeOptions {
  // Put the ids of the file's post-processor around the text (Llama-3: <|begin_of_text|> in front).
  bool add_special_tokens = true;
  // Text that spells a special token ("<|eot_id|>") becomes that token's id. Off: it is encoded as ordinary text, so
  // that what a user writes can never act as control. Added tokens that are not special are always recognised.
  bool parse_special_tokens = true;
};

class Tokenizer {
 public:
  // Reads DIR/tokenizer.json and, when present, bos_token of DIR/tokenizer_config.json. NOT_FOUND when there is no
  // tokenizer.json; INVALID_ARGUMENT (file, field, value, limit) when it is broken; UNIMPLEMENTED when it asks for
  // something Nibble would tokenize differently from the reference.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& dir);
  // The same from the text of a tokenizer.json.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(std::string_view tokenizer_json);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // INVALID_ARGUMENT with the byte offset when `text` is not UTF-8, or when it is longer than kMaxTextBytes;
  // RESOURCE_EXHAUSTED when the file's own regular expression backtracks without end on this text. Time grows as
  // n log n with the length of the text, whatever it contains.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text, EncodeOptions options = {}) const;

  // The text of `ids`; bytes that are not UTF-8 become U+FFFD, one for each maximal invalid part (as Rust's
  // from_utf8_lossy, hence as the reference). INVALID_ARGUMENT with the position when an id names no token.
  absl::StatusOr<std::string> Decode(std::span<const uint32_t> ids, bool skip_special_tokens = true) const;

  // The bytes a token stands for: not necessarily whole characters. Empty when the id names no token. The view lives as
  // long as the tokenizer.
  std::string_view TokenBytes(uint32_t id) const;
  // Whether the token's bytes are valid UTF-8 by themselves.
  bool IsWholeUtf8(uint32_t id) const { return id < flags_.size() && (flags_[id] & kWholeUtf8) != 0; }
  bool IsSpecial(uint32_t id) const { return id < flags_.size() && (flags_[id] & kSpecial) != 0; }
  bool IsKnown(uint32_t id) const { return id < flags_.size() && (flags_[id] & kKnown) != 0; }

  // `token` in the spelling of tokenizer.json ("<|eot_id|>", "Ġthe").
  std::optional<uint32_t> TokenToId(std::string_view token) const;

  // One more than the largest id. A model's embedding may have more rows (padding), never fewer.
  uint32_t vocab_size() const { return static_cast<uint32_t>(flags_.size()); }
  // The first id that the post-processor puts in front of a text; without one, bos_token of tokenizer_config.json.
  std::optional<uint32_t> bos_id() const { return bos_id_; }

  static constexpr size_t kMaxTextBytes = size_t{64} << 20;

 private:
  struct Parts;
  enum TokenFlag : uint8_t { kKnown = 1, kSpecial = 2, kWholeUtf8 = 4 };

  Tokenizer();

  std::unique_ptr<const Parts> parts_;  // vocabulary, merges, pre-tokenizer, added tokens
  std::vector<uint8_t> flags_;          // [vocab_size], TokenFlag
  std::optional<uint32_t> bos_id_;
};

}  // namespace nibble
