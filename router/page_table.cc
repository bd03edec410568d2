#include "router/page_table.h"

#include <algorithm>

#include "common/base/check.h"

namespace nibble {

PageTables::PageTables(uint32_t num_pages, uint32_t page_tokens, bool prefix_cache)
    : page_tokens_(page_tokens),
      prefix_cache_(prefix_cache),
      pool_(num_pages),
      cache_(prefix_cache ? num_pages : 0, page_tokens) {}

PrefixMatch PageTables::Match(const std::string& cache_salt, absl::Span<const uint32_t> tokens,
                              uint32_t max_pages) const {
  PrefixMatch match;
  if (!prefix_cache_) return match;
  match.node = cache_.FindRoot(cache_salt);
  if (match.node == PrefixCache::kNoNode) return match;
  max_pages = std::min<uint32_t>(max_pages, static_cast<uint32_t>(tokens.size() / page_tokens_));
  while (match.num_pages < max_pages) {
    const auto page_of_tokens = tokens.subspan(size_t{match.num_pages} * page_tokens_, page_tokens_);
    const PrefixCache::Node child = cache_.Find(match.node, page_of_tokens);
    if (child == PrefixCache::kNoNode) break;
    match.node = child;
    match.pages.push_back(cache_.page(child));
    match.num_unreferenced += pool_.references(cache_.page(child)) == 0;
    ++match.num_pages;
  }
  return match;
}

bool PageTables::Continues(const PageTable& table, absl::Span<const uint32_t> table_tokens, const PrefixMatch& match,
                           absl::Span<const uint32_t> tokens) const {
  if (!prefix_cache_ || table.node != match.node) return false;
  const size_t begin = size_t{match.num_pages} * page_tokens_;
  if (table_tokens.size() < begin + page_tokens_ || tokens.size() < begin + page_tokens_) return false;
  return table_tokens.subspan(begin, page_tokens_) == tokens.subspan(begin, page_tokens_);
}

void PageTables::Open(PageTable* table, const std::string& cache_salt, const PrefixMatch& match) {
  NIBBLE_CHECK(table->pages.empty());
  if (!prefix_cache_) return;
  table->root = cache_.AcquireRoot(cache_salt);
  table->node = match.num_pages > 0 ? match.node : table->root;
  table->pages = match.pages;
  table->num_registered = match.num_pages;
  for (const PageId page : match.pages) {
    if (pool_.references(page) == 0) cache_.MarkReferenced(cache_.node_of(page));
    pool_.Reference(page);
  }
}

bool PageTables::Grow(PageTable* table, uint32_t n) {
  if (n > num_available()) return false;
  for (uint32_t i = 0; i < n; ++i) {
    PageId page = pool_.Take();
    if (page == kNoPage) {
      pool_.Free(cache_.Evict());
      page = pool_.Take();
    }
    table->pages.push_back(page);
  }
  return true;
}

void PageTables::Register(PageTable* table, absl::Span<const uint32_t> tokens, uint32_t computed) {
  while (HasFullPage(*table, tokens.size(), computed)) {
    const auto page_of_tokens = tokens.subspan(size_t{table->num_registered} * page_tokens_, page_tokens_);
    const PageId page = table->pages[table->num_registered];
    PrefixCache::Node node = cache_.Find(table->node, page_of_tokens);
    if (node == PrefixCache::kNoNode) {
      node = cache_.Insert(table->node, page_of_tokens, page);
    } else {
      // The same prefix was computed twice. When the other copy is in use, this table's path ends here (its later
      // pages must not hang below a page it does not hold); it tries again when its next page is full. Otherwise this
      // copy takes the other's place.
      if (pool_.references(cache_.page(node)) > 0) return;
      pool_.Free(cache_.ReplacePage(node, page));
    }
    table->node = node;
    ++table->num_registered;
  }
}

void PageTables::Unreference(PageId page) {
  if (pool_.Unreference(page) > 0) return;
  const PrefixCache::Node node = prefix_cache_ ? cache_.node_of(page) : PrefixCache::kNoNode;
  if (node == PrefixCache::kNoNode) {
    pool_.Free(page);
  } else {
    cache_.MarkUnreferenced(node);
  }
}

void PageTables::Release(PageTable* table) {
  for (auto page = table->pages.rbegin(); page != table->pages.rend(); ++page) Unreference(*page);
  if (table->root != PrefixCache::kNoNode) cache_.ReleaseRoot(table->root);
  *table = PageTable{};
}

}  // namespace nibble
