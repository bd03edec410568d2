// Byte-pair encoding of one word: as long as some neighbouring pair has a merge, apply the merge of lowest rank, the
// leftmost first. Source: Sennrich et al. 2016, section 3.2; tie-breaking as huggingface/tokenizers models/bpe/word.rs.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "common/text/vocabulary.h"

namespace nibble {

// Immutable; usable from any number of threads.
class BytePairEncoder {
 public:
  // merges: pairs of token spellings in rank order; of a pair that occurs twice the later rank counts, as in the
  // reference. ignore_merges: a word that is a token is that token, whether or not merges lead to it. `vocabulary` must
  // outlive the result. INVALID_ARGUMENT names a merge whose parts or whole are no tokens, or a byte of UTF-8 text that
  // has no token.
  static absl::StatusOr<BytePairEncoder> Create(const Vocabulary* vocabulary,
                                                const std::vector<std::pair<std::string, std::string>>& merges,
                                                bool ignore_merges);

  // Appends the ids of `word`: valid UTF-8, not empty, at most 2^31 - 1 bytes. O(n log n).
  void Encode(std::string_view word, std::vector<uint32_t>* ids) const;

 private:
  struct Merge {
    uint32_t rank = kNoRank;
    uint32_t id = 0;
  };
  static constexpr uint32_t kNoRank = UINT32_MAX;
  static constexpr uint32_t kNoToken = UINT32_MAX;
  // Up to here scanning all pairs for the lowest rank beats a heap; English words have some five bytes.
  static constexpr size_t kShortWordBytes = 40;

  explicit BytePairEncoder(const Vocabulary* vocabulary) : vocabulary_(vocabulary) {}

  Merge FindMerge(uint32_t left, uint32_t right) const {
    const auto it = merges_.find(uint64_t{left} << 32 | right);
    return it == merges_.end() ? Merge{} : it->second;
  }
  void MergeAll(std::string_view word, std::vector<uint32_t>* ids) const;
  void MergeShort(std::string_view word, std::vector<uint32_t>* ids) const;
  void MergeLong(std::string_view word, std::vector<uint32_t>* ids) const;

  const Vocabulary* vocabulary_;
  std::array<uint32_t, 256> byte_ids_;           // kNoToken for bytes that UTF-8 never contains, at most
  absl::flat_hash_map<uint64_t, Merge> merges_;  // left << 32 | right
  std::vector<bool> is_own_encoding_;            // [vocab_size]: the token's bytes encode to the token alone
};

}  // namespace nibble
