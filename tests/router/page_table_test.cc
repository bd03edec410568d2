// Pages, the prefix trie and page tables: small stories with every count checked.
#include "router/page_table.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "router/page_pool.h"
#include "router/prefix_cache.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<uint32_t> Tokens(uint32_t n, uint32_t first = 0) {
  std::vector<uint32_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST(PagePool, TakesEveryPageOnceAndCountsHolders) {
  PagePool pool(3);
  EXPECT_EQ(pool.Take(), 0u);
  EXPECT_EQ(pool.Take(), 1u);
  EXPECT_EQ(pool.Take(), 2u);
  EXPECT_EQ(pool.Take(), kNoPage);
  pool.Reference(1);
  EXPECT_EQ(pool.references(1), 2u);
  EXPECT_EQ(pool.Unreference(1), 1u);
  EXPECT_EQ(pool.Unreference(1), 0u);
  EXPECT_EQ(pool.num_free(), 0u) << "an unreferenced page is not yet free";
  pool.Free(1);
  EXPECT_TRUE(pool.is_free(1));
  EXPECT_EQ(pool.Take(), 1u);
}

TEST(PagePoolDeathTest, MisuseAborts) {
  PagePool pool(2);
  EXPECT_DEATH(pool.Reference(0), "page 0");
  EXPECT_DEATH(pool.Unreference(2), "page < num_pages");
  const PageId page = pool.Take();
  EXPECT_DEATH(pool.Free(page), "1 vs 0");
}

TEST(PrefixCache, FindsOnlyExactChildren) {
  PrefixCache cache(4, 2);
  const auto root = cache.AcquireRoot("");
  const auto a = cache.Insert(root, {1, 2}, 0);
  const auto b = cache.Insert(a, {3, 4}, 1);
  EXPECT_EQ(cache.Find(root, {1, 2}), a);
  EXPECT_EQ(cache.Find(a, {3, 4}), b);
  EXPECT_EQ(cache.Find(root, {3, 4}), PrefixCache::kNoNode) << "same tokens, other prefix";
  EXPECT_EQ(cache.Find(a, {3, 5}), PrefixCache::kNoNode);
  EXPECT_EQ(cache.page(b), 1u);
  EXPECT_EQ(cache.node_of(1), b);
  EXPECT_EQ(cache.node_of(2), PrefixCache::kNoNode);
}

TEST(PrefixCache, EvictsLeastRecentlyReleasedFirst) {
  PrefixCache cache(4, 1);
  const auto root = cache.AcquireRoot("");
  const auto a = cache.Insert(root, {1}, 0);
  const auto b = cache.Insert(root, {2}, 1);
  const auto c = cache.Insert(root, {3}, 2);
  cache.MarkUnreferenced(b);
  cache.MarkUnreferenced(a);
  cache.MarkUnreferenced(c);
  cache.MarkReferenced(a);  // from the middle
  EXPECT_EQ(cache.num_unreferenced(), 2u);
  EXPECT_EQ(cache.Evict(), 1u);
  EXPECT_EQ(cache.Evict(), 2u);
  EXPECT_EQ(cache.Evict(), kNoPage);
  EXPECT_EQ(cache.num_cached(), 1u);
  EXPECT_EQ(cache.Find(root, {2}), PrefixCache::kNoNode);
  EXPECT_EQ(cache.Find(root, {1}), a);
}

TEST(PrefixCache, SaltsAreSeparateAndForgottenWhenUnused) {
  PrefixCache cache(2, 1);
  const auto red = cache.AcquireRoot("red");
  const auto blue = cache.AcquireRoot("blue");
  EXPECT_NE(red, blue);
  cache.MarkUnreferenced(cache.Insert(red, {1}, 0));
  EXPECT_EQ(cache.Find(blue, {1}), PrefixCache::kNoNode);
  cache.ReleaseRoot(red);
  cache.ReleaseRoot(blue);
  EXPECT_EQ(cache.FindRoot("red"), red) << "something is cached below it";
  EXPECT_EQ(cache.FindRoot("blue"), PrefixCache::kNoNode);
  EXPECT_EQ(cache.Evict(), 0u);
  EXPECT_EQ(cache.FindRoot("red"), PrefixCache::kNoNode);
  // A thousand salts, one after the other, need no more than one root's memory.
  const auto first = cache.AcquireRoot("0");
  cache.ReleaseRoot(first);
  for (int i = 1; i < 1000; ++i) {
    const auto root = cache.AcquireRoot(std::to_string(i));
    EXPECT_EQ(root, first);
    cache.ReleaseRoot(root);
  }
}

// A table that has computed and registered all of `tokens`.
PageTable Computed(PageTables* tables, const std::vector<uint32_t>& tokens, const std::string& salt = "") {
  PageTable table;
  tables->Open(&table, salt, tables->Match(salt, tokens, 1000));
  EXPECT_TRUE(tables->Grow(&table, tables->PagesFor(tokens.size()) - static_cast<uint32_t>(table.pages.size())));
  tables->Register(&table, tokens, static_cast<uint32_t>(tokens.size()));
  return table;
}

TEST(PageTables, SharesWholePagesOfTheSameSaltOnly) {
  PageTables tables(8, 4, true);
  PageTable first = Computed(&tables, Tokens(10));
  EXPECT_THAT(first.pages, ElementsAre(0, 1, 2));
  EXPECT_EQ(first.num_registered, 2u);

  EXPECT_THAT(tables.Match("", Tokens(10), 10).pages, ElementsAre(0, 1)) << "the third page is not full";
  EXPECT_THAT(tables.Match("", Tokens(10), 1).pages, ElementsAre(0)) << "capped";
  EXPECT_THAT(tables.Match("", Tokens(7), 10).pages, ElementsAre(0));
  EXPECT_THAT(tables.Match("", Tokens(10, 1), 10).pages, IsEmpty());
  EXPECT_THAT(tables.Match("other", Tokens(10), 10).pages, IsEmpty());

  PageTable second = Computed(&tables, Tokens(10));
  EXPECT_THAT(second.pages, ElementsAre(0, 1, 3));
  EXPECT_EQ(tables.num_available(), 4u);
  tables.Release(&first);
  EXPECT_EQ(tables.num_available(), 5u) << "shared pages are still held";
  tables.Release(&second);
  EXPECT_EQ(tables.num_available(), 8u);
  EXPECT_EQ(tables.num_cached(), 2u);
  EXPECT_EQ(tables.Match("", Tokens(10), 10).num_unreferenced, 2u);
}

TEST(PageTables, RegistersOnlyWhatIsBothKnownAndComputed) {
  PageTables tables(4, 4, true);
  const std::vector<uint32_t> tokens = Tokens(12);
  PageTable table;
  tables.Open(&table, "", PrefixMatch{});
  ASSERT_TRUE(tables.Grow(&table, 3));
  tables.Register(&table, tokens, 3);
  EXPECT_EQ(table.num_registered, 0u) << "page 0 is not computed";
  tables.Register(&table, tokens, 7);
  EXPECT_EQ(table.num_registered, 1u);
  tables.Register(&table, absl::MakeConstSpan(tokens).first(7), 12);
  EXPECT_EQ(table.num_registered, 1u) << "page 1's last token is not known";
  tables.Register(&table, tokens, 12);
  EXPECT_EQ(table.num_registered, 3u);
}

TEST(PageTables, EvictsTailsBeforeHeadsAndOldBeforeNew) {
  PageTables tables(6, 2, true);
  PageTable old_table = Computed(&tables, Tokens(6));       // pages 0 1 2
  PageTable new_table = Computed(&tables, Tokens(6, 100));  // pages 3 4 5
  tables.Release(&old_table);
  tables.Release(&new_table);
  PageTable table;
  tables.Open(&table, "", PrefixMatch{});
  ASSERT_TRUE(tables.Grow(&table, 1));
  EXPECT_THAT(table.pages, ElementsAre(2)) << "the tail of what was released first";
  EXPECT_EQ(tables.Match("", Tokens(6), 10).num_pages, 2u);
  ASSERT_TRUE(tables.Grow(&table, 3));
  EXPECT_THAT(table.pages, ElementsAre(2, 1, 0, 5));
  EXPECT_EQ(tables.Match("", Tokens(6), 10).num_pages, 0u);
  EXPECT_EQ(tables.Match("", Tokens(6, 100), 10).num_pages, 2u);
  EXPECT_FALSE(tables.Grow(&table, 3));
  EXPECT_EQ(table.pages.size(), 4u) << "all or nothing";
}

TEST(PageTables, TakesOverAnUnusedCopyOfTheSamePrefix) {
  PageTables tables(8, 2, true);
  PageTable first = Computed(&tables, Tokens(4));  // pages 0 1
  tables.Release(&first);
  // The same four tokens again, but only one page may be matched: the second is computed once more, into page 2.
  PageTable second;
  tables.Open(&second, "", tables.Match("", Tokens(4), 1));
  ASSERT_TRUE(tables.Grow(&second, 1));
  tables.Register(&second, Tokens(4), 4);
  EXPECT_THAT(second.pages, ElementsAre(0, 2));
  EXPECT_EQ(second.num_registered, 2u);
  EXPECT_EQ(tables.num_available(), 6u) << "the other copy is free at once";
  EXPECT_THAT(tables.Match("", Tokens(4), 10).pages, ElementsAre(0, 2));
  tables.Release(&second);
  EXPECT_EQ(tables.num_available(), 8u);
}

TEST(PageTables, LeavesACopyThatIsInUseAloneUntilItIsReleased) {
  PageTables tables(8, 2, true);
  PageTable first = Computed(&tables, Tokens(4));  // pages 0 1
  PageTable second;
  tables.Open(&second, "", tables.Match("", Tokens(4), 1));
  ASSERT_TRUE(tables.Grow(&second, 2));  // pages 2 3
  const std::vector<uint32_t> tokens = Tokens(6);
  tables.Register(&second, tokens, 4);
  EXPECT_EQ(second.num_registered, 1u);
  EXPECT_THAT(tables.Match("", tokens, 10).pages, ElementsAre(0, 1));
  tables.Release(&first);
  tables.Register(&second, tokens, 6);
  EXPECT_EQ(second.num_registered, 3u);
  EXPECT_THAT(tables.Match("", tokens, 10).pages, ElementsAre(0, 2, 3));
  tables.Release(&second);
  EXPECT_EQ(tables.num_available(), 8u);
}

TEST(PageTables, WithoutPrefixCacheNothingIsKept) {
  PageTables tables(4, 2, false);
  PageTable table = Computed(&tables, Tokens(4));
  EXPECT_EQ(tables.num_cached(), 0u);
  EXPECT_FALSE(tables.HasFullPage(table, 4, 4));
  tables.Release(&table);
  EXPECT_EQ(tables.Match("", Tokens(4), 10).num_pages, 0u);
  EXPECT_EQ(tables.num_available(), 4u);
}

// Random tables come, grow, register and go. After each move every page is free, evictable or held, exactly once.
TEST(PageTables, ConservePagesUnderRandomUse) {
  std::mt19937 random(7);
  const auto below = [&](uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(random); };
  for (int round = 0; round < 200; ++round) {
    PageTables tables(16, 2, true);
    std::vector<std::pair<PageTable, std::vector<uint32_t>>> live;
    for (int move = 0; move < 100; ++move) {
      if (live.size() < 5 && below(2) == 0) {
        std::vector<uint32_t> tokens(1 + below(10));
        for (uint32_t& token : tokens) token = below(2);
        PageTable table;
        const PrefixMatch match = tables.Match("", tokens, static_cast<uint32_t>(tokens.size() - 1) / 2);
        const uint32_t more = tables.PagesFor(tokens.size()) - match.num_pages;
        if (more + match.num_unreferenced > tables.num_available()) continue;
        tables.Open(&table, "", match);
        ASSERT_TRUE(tables.Grow(&table, more));
        live.emplace_back(std::move(table), std::move(tokens));
      } else if (!live.empty()) {
        const size_t i = below(static_cast<uint32_t>(live.size()));
        auto& [table, tokens] = live[i];
        tables.Register(&table, tokens, below(static_cast<uint32_t>(tokens.size()) + 1));
        if (below(3) == 0) {
          tables.Release(&table);
          live.erase(live.begin() + static_cast<ptrdiff_t>(i));
        }
      }
      std::vector<bool> held(16, false);
      for (const auto& [table, tokens] : live) {
        for (const PageId page : table.pages) held[page] = true;
      }
      ASSERT_EQ(tables.num_available() + std::count(held.begin(), held.end(), true), 16);
    }
    for (auto& [table, tokens] : live) tables.Release(&table);
    EXPECT_EQ(tables.num_available(), 16u);
  }
}

}  // namespace
}  // namespace nibble
