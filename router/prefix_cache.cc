#include "router/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <string>

#include "absl/hash/hash.h"
#include "common/base/check.h"

namespace nibble {

PrefixCache::PrefixCache(uint32_t num_pages, uint32_t page_tokens)
    : page_tokens_(page_tokens),
      nodes_(num_pages),
      node_tokens_(static_cast<size_t>(num_pages) * page_tokens),
      node_of_page_(num_pages, kNoNode),
      buckets_(std::bit_ceil(std::max(num_pages, 1u)), kNoNode) {
  NIBBLE_CHECK_GT(page_tokens, 0u);
  for (Node node = num_pages; node > 0; --node) {
    nodes_[node - 1].next_in_bucket = first_free_;
    first_free_ = node - 1;
  }
}

PrefixCache::Node PrefixCache::AcquireRoot(const std::string& cache_salt) {
  const auto [entry, is_new] = root_of_salt_.try_emplace(cache_salt, kNoNode);
  if (is_new) {
    if (free_roots_.empty()) {
      free_roots_.push_back(static_cast<Node>(nodes_.size() + roots_.size()));
      roots_.emplace_back();
    }
    entry->second = free_roots_.back();
    free_roots_.pop_back();
    root(entry->second) = Root{.cache_salt = cache_salt};
  }
  ++root(entry->second).num_holders;
  return entry->second;
}

void PrefixCache::ReleaseRoot(Node node) {
  NIBBLE_CHECK(is_root(node));
  NIBBLE_CHECK_GT(root(node).num_holders, 0u);
  --root(node).num_holders;
  ForgetRootIfUnused(node);
}

void PrefixCache::ForgetRootIfUnused(Node node) {
  if (root(node).num_holders > 0 || root(node).num_children > 0) return;
  root_of_salt_.erase(root(node).cache_salt);
  root(node) = Root{};
  free_roots_.push_back(node);
}

PrefixCache::Node PrefixCache::FindRoot(const std::string& cache_salt) const {
  const auto entry = root_of_salt_.find(cache_salt);
  return entry == root_of_salt_.end() ? kNoNode : entry->second;
}

absl::Span<const uint32_t> PrefixCache::tokens(Node node) const {
  return absl::MakeConstSpan(node_tokens_).subspan(static_cast<size_t>(node) * page_tokens_, page_tokens_);
}

uint64_t PrefixCache::Hash(Node parent, absl::Span<const uint32_t> tokens) const {
  return absl::HashOf(parent, tokens);
}

PrefixCache::Node PrefixCache::Find(Node parent, absl::Span<const uint32_t> wanted) const {
  NIBBLE_CHECK_EQ(wanted.size(), page_tokens_);
  const uint64_t hash = Hash(parent, wanted);
  Node node = buckets_[hash & (buckets_.size() - 1)];
  while (node != kNoNode) {
    const NodeData& data = nodes_[node];
    if (data.hash == hash && data.parent == parent && tokens(node) == wanted) return node;
    node = data.next_in_bucket;
  }
  return kNoNode;
}

PrefixCache::Node PrefixCache::Insert(Node parent, absl::Span<const uint32_t> tokens, PageId page) {
  NIBBLE_CHECK_EQ(Find(parent, tokens), kNoNode);
  NIBBLE_CHECK_EQ(node_of_page_[page], kNoNode);
  NIBBLE_CHECK_NE(first_free_, kNoNode);  // as many nodes as pages
  const Node node = first_free_;
  NodeData& data = nodes_[node];
  first_free_ = data.next_in_bucket;

  data = NodeData{.hash = Hash(parent, tokens), .parent = parent, .page = page};
  data.next_in_bucket = *Bucket(data.hash);
  *Bucket(data.hash) = node;
  std::copy(tokens.begin(), tokens.end(), node_tokens_.begin() + static_cast<size_t>(node) * page_tokens_);
  node_of_page_[page] = node;
  ++(is_root(parent) ? root(parent).num_children : nodes_[parent].num_children);
  ++num_cached_;
  return node;
}

PageId PrefixCache::ReplacePage(Node node, PageId page) {
  NIBBLE_CHECK_EQ(node_of_page_[page], kNoNode);
  MarkReferenced(node);
  const PageId old = nodes_[node].page;
  node_of_page_[old] = kNoNode;
  node_of_page_[page] = node;
  nodes_[node].page = page;
  return old;
}

void PrefixCache::MarkUnreferenced(Node node) {
  NodeData& data = nodes_[node];
  NIBBLE_CHECK(!data.unreferenced, "node " + std::to_string(node));
  data.unreferenced = true;
  data.older = newest_;
  data.newer = kNoNode;
  (newest_ == kNoNode ? oldest_ : nodes_[newest_].newer) = node;
  newest_ = node;
  ++num_unreferenced_;
}

void PrefixCache::MarkReferenced(Node node) {
  NodeData& data = nodes_[node];
  NIBBLE_CHECK(data.unreferenced, "node " + std::to_string(node));
  data.unreferenced = false;
  (data.older == kNoNode ? oldest_ : nodes_[data.older].newer) = data.newer;
  (data.newer == kNoNode ? newest_ : nodes_[data.newer].older) = data.older;
  data.older = data.newer = kNoNode;
  --num_unreferenced_;
}

PageId PrefixCache::Evict() {
  const Node node = oldest_;
  if (node == kNoNode) return kNoPage;
  NIBBLE_CHECK_EQ(nodes_[node].num_children, 0u);  // descendants were released earlier, hence evicted earlier
  MarkReferenced(node);
  const PageId page = nodes_[node].page;
  Unlink(node);
  return page;
}

void PrefixCache::Unlink(Node node) {
  NodeData& data = nodes_[node];
  Node* link = Bucket(data.hash);
  while (*link != node) link = &nodes_[*link].next_in_bucket;
  *link = data.next_in_bucket;

  const Node parent = data.parent;
  node_of_page_[data.page] = kNoNode;
  data = NodeData{.next_in_bucket = first_free_};
  first_free_ = node;
  --num_cached_;
  if (is_root(parent)) {
    --root(parent).num_children;
    ForgetRootIfUnused(parent);
  } else {
    --nodes_[parent].num_children;
  }
}

}  // namespace nibble
