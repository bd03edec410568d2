#include "common/text/vocabulary.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/text/byte_level.h"
#include "common/text/utf8.h"

namespace nibble {

absl::StatusOr<Vocabulary> Vocabulary::Create(const std::vector<std::pair<std::string, uint32_t>>& entries) {
  uint32_t size = 0;
  for (const auto& [spelling, id] : entries) {
    if (id > kMaxTokenId)
      return absl::InvalidArgumentError(
          fmt::format("token \"{}\" has id {}, must be at most {}", Excerpt(spelling), id, kMaxTokenId));
    size = std::max(size, id + 1);
  }

  Vocabulary result;
  std::vector<std::string> bytes_of(size);
  result.known_.assign(size, false);
  result.by_bytes_.reserve(entries.size());
  for (const auto& [spelling, id] : entries) {
    if (result.known_[id])
      return absl::InvalidArgumentError(
          fmt::format("token id {} is used twice, the second time by \"{}\"", id, Excerpt(spelling)));
    result.known_[id] = true;
    std::optional<std::string> bytes = BytesFromSpelling(spelling);
    (bytes ? result.by_bytes_ : result.by_literal_).emplace(bytes ? *bytes : spelling, id);
    bytes_of[id] = bytes ? *std::move(bytes) : spelling;
  }
  result.offsets_.reserve(size_t{size} + 1);
  result.offsets_.push_back(0);
  for (const std::string& bytes : bytes_of) {
    result.arena_ += bytes;
    result.offsets_.push_back(result.arena_.size());
  }
  return result;
}

std::optional<uint32_t> Vocabulary::FindSpelling(std::string_view spelling) const {
  if (const std::optional<std::string> bytes = BytesFromSpelling(spelling)) return FindBytes(*bytes);
  const auto it = by_literal_.find(spelling);
  return it == by_literal_.end() ? std::nullopt : std::optional<uint32_t>(it->second);
}

}  // namespace nibble
