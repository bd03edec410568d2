#include "router/prefix_index.h"

#include <algorithm>

#include "absl/hash/hash.h"
#include "common/base/check.h"

namespace nibble {

std::vector<uint64_t> PrefixChain(absl::Span<const uint32_t> prompt_token_ids, std::string_view cache_salt,
                                  uint32_t page_tokens) {
  std::vector<uint64_t> chain;
  if (prompt_token_ids.empty()) return chain;
  const size_t num_pages = (prompt_token_ids.size() - 1) / page_tokens;
  chain.reserve(num_pages);
  uint64_t hash = absl::HashOf(cache_salt);
  for (size_t i = 0; i < num_pages; ++i) {
    hash = absl::HashOf(hash, prompt_token_ids.subspan(i * page_tokens, page_tokens));
    chain.push_back(hash);
  }
  return chain;
}

PrefixIndex::PrefixIndex(uint32_t num_replicas) : replicas_(num_replicas) {}

void PrefixIndex::Reset(uint32_t replica, uint32_t capacity_pages) {
  std::lock_guard<std::mutex> lock(mutex_);
  NIBBLE_CHECK_LT(replica, replicas_.size());
  replicas_[replica] = Replica{};
  replicas_[replica].capacity = capacity_pages;
}

void PrefixIndex::Placed(uint32_t replica, absl::Span<const uint64_t> chain) {
  std::lock_guard<std::mutex> lock(mutex_);
  NIBBLE_CHECK_LT(replica, replicas_.size());
  Replica& r = replicas_[replica];
  // Deepest page first: the front ends up with the shallowest, so tails are forgotten before what they hang from.
  const size_t kept = std::min<size_t>(chain.size(), r.capacity);
  for (size_t i = kept; i > 0; --i) {
    const uint64_t page = chain[i - 1];
    const auto [it, is_new] = r.pages.try_emplace(page);
    if (is_new) {
      r.recent.push_front(page);
      it->second = r.recent.begin();
    } else {
      r.recent.splice(r.recent.begin(), r.recent, it->second);
    }
  }
  while (r.pages.size() > r.capacity) {
    r.pages.erase(r.recent.back());
    r.recent.pop_back();
  }
}

std::vector<uint32_t> PrefixIndex::MatchedPages(absl::Span<const uint64_t> chain) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> matched(replicas_.size(), 0);
  for (size_t i = 0; i < replicas_.size(); ++i) {
    const auto& pages = replicas_[i].pages;
    while (matched[i] < chain.size() && pages.contains(chain[matched[i]])) ++matched[i];
  }
  return matched;
}

uint32_t PrefixIndex::size(uint32_t replica) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint32_t>(replicas_[replica].pages.size());
}

}  // namespace nibble
