// The pages of a rank's KV cache: one allocation, a layer's pages after the other's. Who holds which page is the
// router's knowledge; here a page is memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "kernels/ops.h"

namespace nibble {

class KvPool {
 public:
  // As many pages as budget_bytes holds. RESOURCE_EXHAUSTED when that is none, or when memory lacks.
  static absl::StatusOr<KvPool> Create(Ops& ops, const KvLayout& layout, int64_t num_layers, int64_t budget_bytes) {
    KvPool pool;
    pool.layout_ = layout;
    pool.num_layers_ = num_layers;
    pool.num_pages_ = std::min<int64_t>(budget_bytes / pool.page_bytes(), std::numeric_limits<int32_t>::max());
    if (pool.num_pages_ < 1) {
      return absl::ResourceExhaustedError(absl::StrCat("kv_memory_bytes is ", budget_bytes, ", one KV page of ",
                                                       kPageTokens, " tokens needs ", pool.page_bytes(),
                                                       " bytes on this rank"));
    }
    NIBBLE_ASSIGN_OR_RETURN(pool.memory_, ops.Allocate(static_cast<size_t>(pool.num_pages_ * pool.page_bytes())));
    return pool;
  }

  const KvLayout& layout() const { return layout_; }
  int64_t num_pages() const { return num_pages_; }
  int64_t page_bytes() const { return num_layers_ * layout_.page_bytes(); }  // all layers

  KvPages layer(int64_t index) const {
    return {.data = memory_.as<uint8_t>() + index * num_pages_ * layout_.page_bytes(),
            .num_pages = num_pages_,
            .layout = layout_};
  }

  // Makes every stored scale, zero and value a NaN, so that reading a position nobody wrote shows.
  void Poison(Ops& ops) {
    const std::vector<uint8_t> ones(size_t{1} << 20, 0xff);
    for (size_t at = 0; at < memory_.bytes(); at += ones.size()) {
      ops.Upload(memory_.as<uint8_t>() + at, ones.data(), std::min(ones.size(), memory_.bytes() - at));
    }
  }

 private:
  KvLayout layout_;
  int64_t num_layers_ = 0;
  int64_t num_pages_ = 0;
  Buffer memory_;
};

}  // namespace nibble
