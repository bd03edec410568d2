// The page tables of a replica's sequences over one pool of pages and one prefix cache: who holds which page, in which
// order. This is all the router knows of KV memory; contents live on the workers.
//
// A page's life:   free → Grow → held by one sequence → Register → cached, shared by every sequence that matched it
//                  → last Release → unreferenced, evictable → Grow of somebody else   (or straight back to free when
//                  it was never registered).
//
// Why a page may be registered (and matched) once the step that fills it is *scheduled*: workers execute plans in
// order, and inside a step every layer appends all rows' keys and values before any row's attention reads. A sequence
// that starts in the same or a later step therefore reads what was written. Nothing is matched earlier than that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "router/page_pool.h"
#include "router/prefix_cache.h"

namespace nibble {

// One sequence's pages in position order: page i holds positions [i * page_tokens, (i + 1) * page_tokens).
struct PageTable {
  uint32_t num_registered = 0;  // leading pages that are the prefix cache's own, i.e. a path from root
  std::vector<PageId> pages;
  PrefixCache::Node root = PrefixCache::kNoNode;  // of the salt; held from Open to Release
  PrefixCache::Node node = PrefixCache::kNoNode;  // deepest node of that path
};

// A path of the prefix cache that a sequence could start with.
struct PrefixMatch {
  PrefixCache::Node node = PrefixCache::kNoNode;
  uint32_t num_pages = 0;
  uint32_t num_unreferenced = 0;  // of them; taking these reduces the pages available to others
  std::vector<PageId> pages;
};

class PageTables {
 public:
  PageTables(uint32_t num_pages, uint32_t page_tokens, bool prefix_cache);

  uint32_t num_pages() const { return pool_.num_pages(); }
  uint32_t page_tokens() const { return page_tokens_; }
  // Pages that Grow can hand out: free ones and cached ones without a reference.
  uint32_t num_available() const { return pool_.num_free() + cache_.num_unreferenced(); }
  uint32_t num_cached() const { return cache_.num_cached(); }
  uint32_t PagesFor(uint64_t num_tokens) const {
    return static_cast<uint32_t>((num_tokens + page_tokens_ - 1) / page_tokens_);
  }

  // The longest cached prefix of whole pages of `tokens`, at most max_pages. Changes nothing.
  PrefixMatch Match(const std::string& cache_salt, absl::Span<const uint32_t> tokens, uint32_t max_pages) const;
  // Would the next page of an open table be the one right below `match`, with these tokens? Then that sequence is about
  // to compute what a sequence with this match would compute too.
  bool Continues(const PageTable& table, absl::Span<const uint32_t> table_tokens, const PrefixMatch& match,
                 absl::Span<const uint32_t> tokens) const;

  // Starts a table with the matched pages (num_pages may be 0). The match must be from the current state.
  void Open(PageTable* table, const std::string& cache_salt, const PrefixMatch& match);
  // Appends n pages, evicting cached ones as needed. False, and nothing changed, when fewer are available.
  bool Grow(PageTable* table, uint32_t n);
  // Makes the table's full pages known to the prefix cache. `computed` leading positions have been scheduled, and
  // `tokens` are the ids known at least up to there: a page counts when both cover it.
  void Register(PageTable* table, absl::Span<const uint32_t> tokens, uint32_t computed);
  // Whether Register could have anything to do: a cheap test for the decode path.
  bool HasFullPage(const PageTable& table, size_t num_known, uint32_t computed) const {
    const uint64_t next_end = (uint64_t{table.num_registered} + 1) * page_tokens_;
    return prefix_cache_ && next_end <= std::min<uint64_t>(num_known, computed);
  }
  // Gives everything back, the deepest page first. Registered pages stay cached until evicted.
  void Release(PageTable* table);

 private:
  void Unreference(PageId page);

  uint32_t page_tokens_;
  bool prefix_cache_;
  PagePool pool_;
  PrefixCache cache_;
};

}  // namespace nibble
