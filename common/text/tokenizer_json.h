// What a tokenizer.json says, checked for form and reduced to what Nibble supports. Nothing here tokenizes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/text/added_tokens.h"
#include "common/text/pre_tokenizer.h"

namespace nibble {

struct TokenizerDefinition {
  std::vector<std::pair<std::string, uint32_t>> vocab;      // spelling, id
  std::vector<std::pair<std::string, std::string>> merges;  // spellings, in rank order
  bool ignore_merges = false;
  bool nfc = false;                      // normalize text to Normalization Form C first
  std::vector<AddedToken> added_tokens;  // contents distinct, not empty
  std::vector<SplitStage> stages;        // pre-tokenizer, the last one is ByteLevel
  std::vector<uint32_t> prefix_ids;      // post-processor: in front of a text
  std::vector<uint32_t> suffix_ids;      // and behind it
};

inline constexpr int64_t kMaxTokenizerFileBytes = int64_t{128} << 20;

// INVALID_ARGUMENT with field, value and limit for a broken file; UNIMPLEMENTED for a well-formed one that asks for
// what Nibble does not do (another model type, normalizer, decoder, ...): better refused than tokenized differently.
// Consistency between the parts (ids of the vocabulary, merges, added tokens) is checked where they are put together.
absl::StatusOr<TokenizerDefinition> ParseTokenizerJson(std::string_view text);

// bos_token of a tokenizer_config.json: a string, an object with "content", or absent (empty result).
absl::StatusOr<std::string> ParseBosToken(std::string_view tokenizer_config);

}  // namespace nibble
