// Which page holds the KV of which whole-page prefix: an exact trie. A node is one page's worth of token ids below its
// parent node; children are found by hash and then compared token by token, so a hit is never a guess. Every
// cache_salt has a root of its own: prefixes are never shared between salts.
//
// Nodes whose page no sequence references stay until they are evicted, least recently released first. Whoever
// references a node references all its ancestors (page_table.h keeps it so) and releases the deepest first, therefore
// an ancestor is never released before its descendants and the least recently released node is always a leaf.
//
// All storage is sized by the number of pages; only roots (one per salt in use) are allocated on the way. Idea of the
// chain of hashed blocks and of tail-first eviction: vLLM, docs/design/prefix_caching.md. Exactness instead of
// trusting a hash, and nodes instead of a table of hashes: SGLang's radix tree (Zheng et al. 2024, section 3).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "router/page_pool.h"

namespace nibble {

class PrefixCache {
 public:
  using Node = uint32_t;  // roots are nodes without a page
  static constexpr Node kNoNode = ~Node{0};

  PrefixCache(uint32_t num_pages, uint32_t page_tokens);

  // The salt's root; made when needed. Every AcquireRoot is paired with one ReleaseRoot; a root that nobody holds and
  // that has no children is forgotten.
  Node AcquireRoot(const std::string& cache_salt);
  void ReleaseRoot(Node root);
  // kNoNode when nothing is cached for the salt.
  Node FindRoot(const std::string& cache_salt) const;

  // The child of `parent` that holds exactly `tokens` (page_tokens of them), or kNoNode.
  Node Find(Node parent, absl::Span<const uint32_t> tokens) const;
  // Adds that child, which must not exist, with a page that some sequence references.
  Node Insert(Node parent, absl::Span<const uint32_t> tokens, PageId page);
  // The node keeps its place and children but now lives in `page`. Returns the page it had. Only of an unreferenced
  // node, which leaves the eviction order: the new page is referenced.
  PageId ReplacePage(Node node, PageId page);

  PageId page(Node node) const { return nodes_[node].page; }
  Node node_of(PageId page) const { return node_of_page_[page]; }  // kNoNode: not cached

  // The node's page has no reference any more / has one again.
  void MarkUnreferenced(Node node);
  void MarkReferenced(Node node);
  // Forgets the least recently released unreferenced node and returns its page; kNoPage when there is none.
  PageId Evict();

  uint32_t num_cached() const { return num_cached_; }              // nodes with a page
  uint32_t num_unreferenced() const { return num_unreferenced_; }  // of them, evictable

 private:
  struct NodeData {
    uint64_t hash = 0;
    Node parent = kNoNode;
    Node next_in_bucket = kNoNode;          // also links free nodes
    Node older = kNoNode, newer = kNoNode;  // eviction order, while unreferenced
    PageId page = kNoPage;
    uint32_t num_children = 0;
    bool unreferenced = false;
  };
  struct Root {
    std::string cache_salt;
    uint32_t num_children = 0;
    uint32_t num_holders = 0;
  };

  bool is_root(Node node) const { return node >= nodes_.size(); }
  Root& root(Node node) { return roots_[node - nodes_.size()]; }
  absl::Span<const uint32_t> tokens(Node node) const;
  uint64_t Hash(Node parent, absl::Span<const uint32_t> tokens) const;
  Node* Bucket(uint64_t hash) { return &buckets_[hash & (buckets_.size() - 1)]; }
  void Unlink(Node node);
  void ForgetRootIfUnused(Node root);

  uint32_t page_tokens_;
  std::vector<NodeData> nodes_;        // as many as pages
  std::vector<uint32_t> node_tokens_;  // [nodes, page_tokens]
  std::vector<Node> node_of_page_;
  std::vector<Node> buckets_;  // power of two, chained through next_in_bucket
  std::vector<Root> roots_;
  std::vector<Node> free_roots_;
  absl::flat_hash_map<std::string, Node> root_of_salt_;
  Node first_free_ = kNoNode;
  Node oldest_ = kNoNode, newest_ = kNoNode;
  uint32_t num_cached_ = 0, num_unreferenced_ = 0;
};

}  // namespace nibble
