#include "router/page_pool.h"

#include <string>

#include "common/base/check.h"

namespace nibble {

PagePool::PagePool(uint32_t num_pages) : references_(num_pages, kFree) {
  free_.reserve(num_pages);
  for (PageId page = num_pages; page > 0; --page) free_.push_back(page - 1);
}

PageId PagePool::Take() {
  if (free_.empty()) return kNoPage;
  const PageId page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

void PagePool::Reference(PageId page) {
  NIBBLE_CHECK_LT(page, num_pages());
  NIBBLE_CHECK(!is_free(page), "page " + std::to_string(page));
  ++references_[page];
}

uint32_t PagePool::Unreference(PageId page) {
  NIBBLE_CHECK_LT(page, num_pages());
  NIBBLE_CHECK(!is_free(page), "page " + std::to_string(page));
  NIBBLE_CHECK_GT(references_[page], 0u);
  return --references_[page];
}

void PagePool::Free(PageId page) {
  NIBBLE_CHECK_LT(page, num_pages());
  NIBBLE_CHECK_EQ(references_[page], 0u);
  references_[page] = kFree;
  free_.push_back(page);
}

}  // namespace nibble
