// Which prefixes were placed on which replica lately, so that placement can guess prefix hits without asking a
// scheduler (which lives on its own thread). An approximation on purpose: keys are hashes, and it says what was sent,
// not what is still cached; being wrong costs some prefill, never a wrong token. The exact answer is prefix_cache.h's.
//
// Bounded: at most `capacity` pages per replica, the least recently placed are forgotten first. Thread-safe.
// Idea: Dynamo's approximate index for workers without KV events; a page counts from the moment it is placed, so that
// a burst of siblings stays together.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"

namespace nibble {

// A prompt's whole pages as a chain of hashes: element i stands for the first i + 1 pages under this salt. The last
// prompt token is always computed, so a page that ends with it does not count.
std::vector<uint64_t> PrefixChain(absl::Span<const uint32_t> prompt_token_ids, std::string_view cache_salt,
                                  uint32_t page_tokens);

class PrefixIndex {
 public:
  explicit PrefixIndex(uint32_t num_replicas);

  // A replica came up with so many pages, or went down (0): nothing is known of it any more.
  void Reset(uint32_t replica, uint32_t capacity_pages);
  // The request with this chain was placed there.
  void Placed(uint32_t replica, absl::Span<const uint64_t> chain);
  // Leading pages of the chain that were placed on each replica, [num_replicas].
  std::vector<uint32_t> MatchedPages(absl::Span<const uint64_t> chain) const;

  uint32_t size(uint32_t replica) const;

 private:
  struct Replica {
    uint32_t capacity = 0;
    std::list<uint64_t> recent;  // most recent first
    absl::flat_hash_map<uint64_t, std::list<uint64_t>::iterator> pages;
  };

  mutable std::mutex mutex_;
  std::vector<Replica> replicas_;  // guarded by mutex_
};

}  // namespace nibble
