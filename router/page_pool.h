// KV pages as the router counts them: ids, reference counts and a free list. A page is on the free list, or referenced
// by sequences, or unreferenced but kept (prefix_cache.h) until somebody needs it.
#pragma once

#include <cstdint>
#include <vector>

namespace nibble {

using PageId = uint32_t;
inline constexpr PageId kNoPage = ~PageId{0};

class PagePool {
 public:
  explicit PagePool(uint32_t num_pages);

  uint32_t num_pages() const { return static_cast<uint32_t>(references_.size()); }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }

  // A free page, now with one reference; kNoPage when there is none.
  PageId Take();
  // One more holder of a page that is not free.
  void Reference(PageId page);
  // One holder less. Returns how many are left; at zero the page is still not free, the caller says what becomes of it.
  uint32_t Unreference(PageId page);
  // Puts an unreferenced page back on the free list.
  void Free(PageId page);

  uint32_t references(PageId page) const { return references_[page] == kFree ? 0 : references_[page]; }
  bool is_free(PageId page) const { return references_[page] == kFree; }

 private:
  static constexpr uint32_t kFree = ~uint32_t{0};

  std::vector<uint32_t> references_;  // per page, or kFree
  std::vector<PageId> free_;          // a stack: the page freed last is warmest
};

}  // namespace nibble
