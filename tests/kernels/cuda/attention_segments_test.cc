// How the chunks of all contexts are shared out over blocks, and the inner order of pages: pure functions.
#include "kernels/cuda/attention/segments.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "kernels/ops.h"

namespace nibble::cuda {
namespace {

struct Shares {
  std::vector<std::vector<int>> owner;  // [head][chunk]
  int divided = 0;                      // heads that more than one block computes
  int most_partials = 0;                // of one block
  int longest = 0;                      // pages of one block, of its own share
  int drawn = 0;                        // shares
};

// What the blocks of a grid compute, by the same functions that the kernel calls; drawn shares are one block more.
Shares ShareOut(const std::vector<int>& head_pages, int max_blocks) {
  int cost = 0, chunks = 0;
  for (int p : head_pages) cost += HeadCost(p), chunks += ChunksOf(p);
  const int longest = *std::max_element(head_pages.begin(), head_pages.end());
  const bool single_chunks = longest <= kChunkPages;
  const HeadLine line = CutLine(cost, chunks, single_chunks, max_blocks);
  EXPECT_LE(line.blocks, max_blocks);
  EXPECT_EQ(line.Cut(line.blocks + line.drawn), cost);
  EXPECT_TRUE(single_chunks || line.drawn == 0);
  Shares shares;
  std::set<int> places;  // of partials in memory
  shares.owner.resize(head_pages.size());
  shares.drawn = line.drawn;
  std::vector<int> partials(line.blocks + 1, 0), lengths(line.blocks + 1, 0);
  int start = 0;
  for (size_t head = 0; head < head_pages.size(); ++head) {
    const int p = head_pages[head];
    int owners = 0, expected = 0;
    for (int share = 0; share < line.blocks + line.drawn; ++share) {
      const int begin = ChunkBoundary(line.Cut(share) - start, p), end = ChunkBoundary(line.Cut(share + 1) - start, p);
      EXPECT_LE(begin, end);
      if (begin == end) continue;
      EXPECT_EQ(begin, expected);
      expected = end;
      const int block = std::min(share, line.blocks);
      ++owners;
      shares.owner[head].insert(shares.owner[head].end(), end - begin, block);
      lengths[block] += std::min(p, end * kChunkPages) - begin * kChunkPages;
      if (begin == 0 && end == ChunksOf(p)) continue;
      int count = 0;
      for (int chunk = begin; chunk < end; chunk = PartialEnd(chunk, end)) ++count;
      EXPECT_EQ(PartialCount(begin, end), count);
      const int place = FirstPartial(block, begin != 0, longest);
      EXPECT_GT(place, TotalPartial(block, longest));
      EXPECT_LE(place + count, TotalPartial(block + 1, longest));
      for (int i = 0; i < count; ++i) EXPECT_TRUE(places.insert(place + i).second);
      partials[block] += count;
    }
    EXPECT_EQ(expected, ChunksOf(p));
    shares.divided += owners > 1;
    start += HeadCost(p);
  }
  for (int block = 0; block < line.blocks; ++block) {
    shares.most_partials = std::max(shares.most_partials, partials[block]);
    shares.longest = std::max(shares.longest, lengths[block]);
  }
  return shares;
}

TEST(SegmentsTest, EveryChunkHasOneOwner) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const int longest = 1 + static_cast<int>(random() % (round % 3 == 0 ? kChunkPages : 500));
    std::vector<int> heads(1 + random() % 200);
    for (int& pages : heads) pages = 1 + static_cast<int>(random() % longest);
    const int max_blocks = 1 + static_cast<int>(random() % 264);
    const Shares shares = ShareOut(heads, max_blocks);
    EXPECT_TRUE(longest > kChunkPages || shares.divided == 0);
    int owned = 0, wanted = 0;
    for (size_t i = 0; i < heads.size(); ++i) {
      owned += static_cast<int>(shares.owner[i].size());
      wanted += ChunksOf(heads[i]);
    }
    ASSERT_EQ(owned, wanted);
    ASSERT_LE(shares.most_partials, MaxPartials(longest));
  }
}

TEST(SegmentsTest, EqualContextsAreSharedEvenly) {
  struct Case {
    int heads, pages, longest, divided, drawn;
  };
  for (const Case& c : std::vector<Case>{{8, 16, 16, 0, 0},      // 1 x 1k
                                         {8, 256, 16, 8, 0},     // 1 x 16k
                                         {512, 64, 128, 0, 0},   // 64 x 4k
                                         {512, 256, 512, 0, 0},  // 64 x 16k
                                         {2048, 16, 96, 0, 464}, // 256 x 1k
                                         {512, 1, 2, 0, 0}}) {   // 64 x 64 tokens
    const Shares shares = ShareOut(std::vector<int>(c.heads, c.pages), 264);
    EXPECT_EQ(shares.longest, c.longest) << c.heads << " heads of " << c.pages;
    EXPECT_EQ(shares.divided, c.divided) << c.heads << " heads of " << c.pages;
    EXPECT_EQ(shares.drawn, c.drawn) << c.heads << " heads of " << c.pages;
  }
}

TEST(SegmentsTest, NothingToDo) {
  const HeadLine line = CutLine(0, 0, true, 264);
  EXPECT_EQ(line.blocks, 0);
}

// Every nibble and every parameter of a page has its own place, and the specification's order comes back.
TEST(KvPageTest, InnerOrderIsAPermutation) {
  for (int d = kHeadDimMultiple; d <= kMaxHeadDim; d += kHeadDimMultiple) {
    const KvLayout layout = {.format = KvFormat::kKV4, .kv_heads = 1, .head_dim = d};
    std::vector<uint8_t> page(layout.head_bytes()), out(layout.head_bytes());
    std::vector<int> uses(2 * page.size(), 0);  // of nibbles
    const auto use_nibble = [&](int byte, int nibble, int value) {
      ++uses[2 * byte + nibble];
      page[byte] = static_cast<uint8_t>(page[byte] | value << (4 * nibble));
    };
    const auto k_code = [](int token, int i) { return (token * 7 + i * 3) % 16; };
    const auto v_code = [](int token, int i) { return (token * 5 + i * 11 + 3) % 16; };
    for (int token = 0; token < kTokensPerPage; ++token) {
      for (int i = 0; i < d; ++i) {
        use_nibble(KCodeByte(d, token, i), i % 2, k_code(token, i));
        use_nibble(VCodeWord(d, token, i / 4 * 4) + i % 4 / 2, i % 2, v_code(token, i));
      }
      for (int byte = 0; byte < 8; ++byte) {
        use_nibble(KvParameters(d, token) + byte, 0, token % 16);
        use_nibble(KvParameters(d, token) + byte, 1, byte);
      }
    }
    for (int n : uses) ASSERT_EQ(n, 1) << "head_dim " << d;
    KvPageToSpecification(d, page.data(), out.data());
    const int half = 32 * d + 4 * kTokensPerPage;
    for (int token = 0; token < kTokensPerPage; ++token) {
      for (int i = 0; i < d; ++i) {
        ASSERT_EQ(out[(token * d + i) / 2] >> (i % 2 * 4) & 15, k_code(token, i));
        ASSERT_EQ(out[half + (token * d + i) / 2] >> (i % 2 * 4) & 15, v_code(token, i));
      }
      for (int byte = 0; byte < 8; ++byte) {  // K scale, K zero, V scale, V zero
        const int at = (byte < 4 ? 0 : half) + 32 * d + byte % 4 / 2 * 2 * kTokensPerPage + token * 2 + byte % 2;
        ASSERT_EQ(out[at], (token % 16) | byte << 4);
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
