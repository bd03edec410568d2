// The model's tokens as bytes: what a token id stands for, and which id a byte string has.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/text/string_map.h"

namespace nibble {

// Bounds what a hostile file can make us allocate; the largest vocabularies of published models have some 260,000
// tokens.
inline constexpr uint32_t kMaxTokenId = (1u << 21) - 1;

// Immutable; usable from any number of threads.
class Vocabulary {
 public:
  // entries: (spelling in tokenizer.json, id). A spelling outside of the byte alphabet stands for its own UTF-8
  // (special tokens such as
  // "<｜begin▁of▁sentence｜>"); merges never produce such a token. Ids may have gaps. INVALID_ARGUMENT for an id that
  // is too large or used twice.
  static absl::StatusOr<Vocabulary> Create(const std::vector<std::pair<std::string, uint32_t>>& entries);

  // Empty for an id that names no token.
  std::string_view Bytes(uint32_t id) const {
    return id < size() ? std::string_view(arena_).substr(offsets_[id], offsets_[id + 1] - offsets_[id])
                       : std::string_view();
  }
  bool Contains(uint32_t id) const { return id < size() && known_[id]; }
  // One more than the largest id.
  uint32_t size() const { return static_cast<uint32_t>(known_.size()); }

  // The token that merges may produce or `ignore_merges` may pick for these bytes.
  std::optional<uint32_t> FindBytes(std::string_view bytes) const {
    const auto it = by_bytes_.find(bytes);
    return it == by_bytes_.end() ? std::nullopt : std::optional<uint32_t>(it->second);
  }
  // The token with this spelling in tokenizer.json.
  std::optional<uint32_t> FindSpelling(std::string_view spelling) const;

 private:
  Vocabulary() = default;

  std::string arena_;               // all tokens' bytes, by id
  std::vector<uint64_t> offsets_;   // [size + 1] into arena_
  std::vector<bool> known_;         // [size]
  StringMap<uint32_t> by_bytes_;    // spelled in the byte alphabet
  StringMap<uint32_t> by_literal_;  // spelled otherwise
};

}  // namespace nibble
