// Tokens that are found in the text itself, before it is cut into words: special tokens and other added tokens.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace nibble {

struct AddedToken {
  uint32_t id = 0;
  std::string content;
  bool lstrip = false;      // swallow white space on the left
  bool rstrip = false;      // swallow white space on the right
  bool normalized = false;  // looked for after normalization, in what the other added tokens left over
  bool special = false;
};

inline constexpr size_t kMaxAddedTokenBytes = 512;

// Finds one group of added tokens, at each place the longest. Immutable; usable from any number of threads.
class AddedTokenMatcher {
 public:
  // Contents are 1..kMaxAddedTokenBytes bytes and distinct.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }

  // Calls, from left to right, `segment` with the text between tokens (never empty) and `token` with the id of each
  // token. parse_special off: special tokens are left in the text. The first error of `segment` ends the scan.
  absl::Status Split(std::string_view text, bool parse_special,
                     absl::FunctionRef<absl::Status(std::string_view)> segment,
                     absl::FunctionRef<void(uint32_t)> token) const;

 private:
  // The longest token that begins at `text`'s first byte, or null.
  const AddedToken* LongestAt(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  std::array<bool, 256> begins_{};  // first bytes of tokens
  // A trie in one table: (node << 8 | byte) -> node; node 0 is the root.
  absl::flat_hash_map<uint64_t, uint32_t> children_;
  std::vector<int32_t> token_at_;  // [nodes]: index of the token that ends here, or -1
};

}  // namespace nibble
