#include "common/text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <queue>

#include "common/base/status.h"
#include "common/text/byte_level.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

bool OccursInUtf8(int byte) { return byte < 0xC0 || (byte >= 0xC2 && byte <= 0xF4); }

absl::StatusOr<std::pair<std::string, uint32_t>> MergePart(const Vocabulary& vocabulary, size_t rank,
                                                           const std::string& spelling) {
  std::optional<std::string> bytes = BytesFromSpelling(spelling);
  const std::optional<uint32_t> id = bytes ? vocabulary.FindBytes(*bytes) : std::nullopt;
  if (!id)
    return absl::InvalidArgumentError(
        fmt::format("model.merges[{}] names \"{}\", which is not in model.vocab", rank, Excerpt(spelling)));
  return std::make_pair(*std::move(bytes), *id);
}

}  // namespace

absl::StatusOr<BytePairEncoder> BytePairEncoder::Create(const Vocabulary* vocabulary,
                                                        const std::vector<std::pair<std::string, std::string>>& merges,
                                                        bool ignore_merges) {
  BytePairEncoder result(vocabulary);
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    const std::optional<uint32_t> id = vocabulary->FindBytes(std::string_view(&c, 1));
    if (!id && OccursInUtf8(byte))
      return absl::InvalidArgumentError(
          fmt::format("model.vocab has no token for byte {}; a byte-level vocabulary needs all", byte));
    result.byte_ids_[byte] = id.value_or(kNoToken);
  }

  result.merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    NIBBLE_ASSIGN_OR_RETURN(const auto left, MergePart(*vocabulary, rank, merges[rank].first));
    NIBBLE_ASSIGN_OR_RETURN(const auto right, MergePart(*vocabulary, rank, merges[rank].second));
    const std::optional<uint32_t> whole = vocabulary->FindBytes(left.first + right.first);
    if (!whole)
      return absl::InvalidArgumentError(fmt::format("model.merges[{}] makes \"{}{}\", which is not in model.vocab",
                                                    rank, Excerpt(merges[rank].first), Excerpt(merges[rank].second)));
    result.merges_.insert_or_assign(uint64_t{left.second} << 32 | right.second,
                                    Merge{static_cast<uint32_t>(rank), *whole});
  }

  // Most words of a text are one token; knowing which tokens encode to themselves replaces their merging by one
  // look-up.
  result.is_own_encoding_.assign(vocabulary->size(), false);
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < vocabulary->size(); ++id) {
    const std::string_view bytes = vocabulary->Bytes(id);
    if (bytes.empty() || vocabulary->FindBytes(bytes) != id) continue;
    const auto has_id = [&](char c) { return result.byte_ids_[static_cast<uint8_t>(c)] != kNoToken; };
    if (!ignore_merges && std::all_of(bytes.begin(), bytes.end(), has_id)) {
      ids.clear();
      result.MergeAll(bytes, &ids);
    }
    result.is_own_encoding_[id] = ignore_merges || (ids.size() == 1 && ids[0] == id);
  }
  return result;
}

void BytePairEncoder::Encode(std::string_view word, std::vector<uint32_t>* ids) const {
  if (const std::optional<uint32_t> id = vocabulary_->FindBytes(word); id && is_own_encoding_[*id]) {
    ids->push_back(*id);
    return;
  }
  MergeAll(word, ids);
}

void BytePairEncoder::MergeAll(std::string_view word, std::vector<uint32_t>* ids) const {
  if (word.size() <= kShortWordBytes) {
    MergeShort(word, ids);
  } else {
    MergeLong(word, ids);
  }
}

void BytePairEncoder::MergeShort(std::string_view word, std::vector<uint32_t>* ids) const {
  std::array<uint32_t, kShortWordBytes> symbols;
  std::array<Merge, kShortWordBytes> merges;  // [i]: of symbols i and i + 1
  size_t count = word.size();
  for (size_t i = 0; i < count; ++i) symbols[i] = byte_ids_[static_cast<uint8_t>(word[i])];
  for (size_t i = 0; i + 1 < count; ++i) merges[i] = FindMerge(symbols[i], symbols[i + 1]);

  while (count > 1) {
    const auto pairs_end = merges.begin() + (count - 1);
    const auto lowest = std::min_element(merges.begin(), pairs_end, [](Merge a, Merge b) { return a.rank < b.rank; });
    if (lowest->rank == kNoRank) break;
    const size_t at = lowest - merges.begin();
    symbols[at] = lowest->id;
    std::copy(symbols.begin() + at + 2, symbols.begin() + count, symbols.begin() + at + 1);
    std::copy(lowest + 1, pairs_end, lowest);
    --count;
    if (at > 0) merges[at - 1] = FindMerge(symbols[at - 1], symbols[at]);
    if (at + 1 < count) merges[at] = FindMerge(symbols[at], symbols[at + 1]);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.begin() + count);
}

void BytePairEncoder::MergeLong(std::string_view word, std::vector<uint32_t>* ids) const {
  // A doubly linked list of symbols by the position of their first byte, and a heap of candidate merges. A candidate
  // whose symbols have changed since is recognised by its rank, which belongs to one pair only.
  struct Symbol {
    uint32_t id;  // kNoToken: merged into the symbol on the left
    int32_t previous;
    int32_t next;
  };
  const auto count = static_cast<int32_t>(word.size());
  std::vector<Symbol> symbols(word.size());
  for (int32_t i = 0; i < count; ++i)
    symbols[i] = {byte_ids_[static_cast<uint8_t>(word[i])], i - 1, i + 1 < count ? i + 1 : -1};

  std::vector<uint64_t> candidates;  // rank << 32 | position: lowest rank first, then leftmost
  candidates.reserve(word.size());
  for (int32_t i = 0; i + 1 < count; ++i) {
    const Merge merge = FindMerge(symbols[i].id, symbols[i + 1].id);
    if (merge.rank != kNoRank) candidates.push_back(uint64_t{merge.rank} << 32 | static_cast<uint32_t>(i));
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>(), std::move(candidates));

  const auto push = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const Merge merge = FindMerge(symbols[left].id, symbols[symbols[left].next].id);
    if (merge.rank != kNoRank) heap.push(uint64_t{merge.rank} << 32 | static_cast<uint32_t>(left));
  };
  while (!heap.empty()) {
    const auto rank = static_cast<uint32_t>(heap.top() >> 32);
    const auto at = static_cast<int32_t>(heap.top() & UINT32_MAX);
    heap.pop();
    Symbol& left = symbols[at];
    if (left.id == kNoToken || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Merge merge = FindMerge(left.id, right.id);
    if (merge.rank != rank) continue;
    left.id = merge.id;
    right.id = kNoToken;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = at;
    push(left.previous);
    push(at);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace nibble
