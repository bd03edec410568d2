#include "common/text/bpe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/text/byte_level.h"
#include "common/text/utf8.h"
#include "common/text/vocabulary.h"

namespace nibble {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

using Entries = std::vector<std::pair<std::string, uint32_t>>;
using Merges = std::vector<std::pair<std::string, std::string>>;

// The 256 bytes in their byte-level spelling, ids 0..255 in code point order of the spelling.
Entries ByteEntries() {
  Entries entries;
  for (char32_t c = 0; c < 0x200; ++c) {
    std::string spelling;
    AppendUtf8(c, &spelling);
    if (BytesFromSpelling(spelling)) entries.emplace_back(spelling, static_cast<uint32_t>(entries.size()));
  }
  EXPECT_EQ(entries.size(), 256u);
  return entries;
}

TEST(ByteLevelTest, SpellsEveryByteOnce) {
  std::vector<std::string> bytes;
  for (const auto& [spelling, id] : ByteEntries()) bytes.push_back(*BytesFromSpelling(spelling));
  std::sort(bytes.begin(), bytes.end());
  EXPECT_EQ(std::unique(bytes.begin(), bytes.end()), bytes.end());
  EXPECT_EQ(BytesFromSpelling("Ġthe"), " the");
  EXPECT_EQ(BytesFromSpelling("ĊâĤ¬"), "\n€");
  EXPECT_EQ(BytesFromSpelling("a b"), std::nullopt);
  EXPECT_EQ(BytesFromSpelling("▁a"), std::nullopt);
}

TEST(VocabularyTest, AllowsGapsAndSeparatesSpellings) {
  const auto vocabulary = Vocabulary::Create({{"Ġa", 7}, {" a", 3}, {"<｜x｜>", 0}});
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->size(), 8u);
  EXPECT_EQ(vocabulary->Bytes(7), " a");
  EXPECT_EQ(vocabulary->Bytes(3), " a");
  EXPECT_EQ(vocabulary->Bytes(0), "<｜x｜>");
  EXPECT_EQ(vocabulary->Bytes(1), "");
  EXPECT_EQ(vocabulary->Bytes(8), "");
  EXPECT_FALSE(vocabulary->Contains(1));
  EXPECT_FALSE(vocabulary->Contains(8));
  EXPECT_EQ(vocabulary->FindBytes(" a"), 7u);
  EXPECT_EQ(vocabulary->FindBytes("<｜x｜>"), std::nullopt);
  EXPECT_EQ(vocabulary->FindSpelling("Ġa"), 7u);
  EXPECT_EQ(vocabulary->FindSpelling(" a"), 3u);
  EXPECT_EQ(vocabulary->FindSpelling("<｜x｜>"), 0u);
}

TEST(VocabularyTest, RejectsBadIds) {
  EXPECT_THAT(Vocabulary::Create({{"a", 1}, {"b", 1}}).status().message(), HasSubstr("id 1 is used twice"));
  EXPECT_THAT(Vocabulary::Create({{"a", kMaxTokenId + 1}}).status().message(), HasSubstr("must be at most 2097151"));
}

TEST(BpeTest, RejectsInconsistentMerges) {
  Entries entries = ByteEntries();
  entries.emplace_back("ab", 256);
  const Vocabulary vocabulary = *Vocabulary::Create(entries);
  EXPECT_THAT(BytePairEncoder::Create(&vocabulary, {{"a", "b"}, {"ab", "cd"}}, false).status().message(),
              HasSubstr("model.merges[1] names \"cd\""));
  EXPECT_THAT(BytePairEncoder::Create(&vocabulary, {{"ab", "c"}}, false).status().message(),
              HasSubstr("model.merges[0] makes \"abc\""));
  EXPECT_THAT(BytePairEncoder::Create(&vocabulary, {{"a b", "c"}}, false).status().message(),
              HasSubstr("names \"a b\""));

  // Bytes that UTF-8 never contains may be missing, others not.
  Entries without = ByteEntries();
  std::erase_if(without, [](const auto& entry) { return BytesFromSpelling(entry.first) == "\xFF"; });
  const Vocabulary lacks_ff = *Vocabulary::Create(without);
  EXPECT_TRUE(BytePairEncoder::Create(&lacks_ff, {}, false).ok());
  std::erase_if(without, [](const auto& entry) { return entry.first == "Ġ"; });
  const Vocabulary lacks_space = *Vocabulary::Create(without);
  EXPECT_THAT(BytePairEncoder::Create(&lacks_space, {}, false).status().message(), HasSubstr("no token for byte 32"));
}

TEST(BpeTest, LaterDuplicateMergeCounts) {
  Entries entries = ByteEntries();
  entries.emplace_back("ab", 256);
  entries.emplace_back("bc", 257);
  const Vocabulary vocabulary = *Vocabulary::Create(entries);
  const auto encoder = BytePairEncoder::Create(&vocabulary, {{"a", "b"}, {"b", "c"}, {"a", "b"}}, false);
  ASSERT_TRUE(encoder.ok());
  std::vector<uint32_t> ids;
  encoder->Encode("abc", &ids);
  EXPECT_THAT(ids, ElementsAre(*vocabulary.FindBytes("a"), 257));
}

TEST(BpeTest, IgnoreMergesPicksWholeTokens) {
  Entries entries = ByteEntries();
  entries.emplace_back("ab", 256);
  entries.emplace_back("abc", 257);  // no merge leads here
  const Vocabulary vocabulary = *Vocabulary::Create(entries);
  const uint32_t c = *vocabulary.FindBytes("c");
  std::vector<uint32_t> ids;
  BytePairEncoder::Create(&vocabulary, {{"a", "b"}}, false)->Encode("abc", &ids);
  EXPECT_THAT(ids, ElementsAre(256, c));
  ids.clear();
  BytePairEncoder::Create(&vocabulary, {{"a", "b"}}, true)->Encode("abc", &ids);
  EXPECT_THAT(ids, ElementsAre(257));
  ids.clear();
  BytePairEncoder::Create(&vocabulary, {{"a", "b"}}, true)->Encode("abcc", &ids);
  EXPECT_THAT(ids, ElementsAre(256, c, c));
}

// The definition, word for word.
std::vector<std::string> NaiveMerge(const std::string& word, const Merges& merges) {
  std::map<std::pair<std::string, std::string>, size_t> rank_of;
  for (size_t rank = 0; rank < merges.size(); ++rank) rank_of[merges[rank]] = rank;
  std::vector<std::string> symbols;
  for (const char c : word) symbols.emplace_back(1, c);
  while (true) {
    size_t best = merges.size(), at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto it = rank_of.find({symbols[i], symbols[i + 1]});
      if (it != rank_of.end() && it->second < best) best = it->second, at = i;
    }
    if (best == merges.size()) return symbols;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + at + 1);
  }
}

TEST(BpeTest, EqualsTheDefinitionOnRandomMerges) {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    // Random merges over two or three letters: dense with ties, overlaps and several ways to the same token.
    const int letters = 2 + round % 2;
    Entries entries = ByteEntries();
    Merges merges;
    std::vector<std::string> tokens;
    for (int i = 0; i < letters; ++i) tokens.emplace_back(1, static_cast<char>('a' + i));
    for (int i = 0; i < 40; ++i) {
      const std::string left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
      if (left.size() + right.size() > 12) continue;
      if (std::find(merges.begin(), merges.end(), std::make_pair(left, right)) != merges.end()) continue;
      merges.emplace_back(left, right);
      if (std::find(tokens.begin(), tokens.end(), left + right) != tokens.end()) continue;
      tokens.push_back(left + right);
      entries.emplace_back(left + right, static_cast<uint32_t>(entries.size()));
    }
    std::shuffle(merges.begin(), merges.end(), random);  // ranks need not be in order of dependence
    const Vocabulary vocabulary = *Vocabulary::Create(entries);
    const auto encoder = BytePairEncoder::Create(&vocabulary, merges, false);
    ASSERT_TRUE(encoder.ok()) << encoder.status();
    for (int i = 0; i < 60; ++i) {
      std::string word;
      const size_t length = 1 + random() % (i % 3 == 0 ? 120 : 45);  // both the scan and the heap
      while (word.size() < length) word.push_back(static_cast<char>('a' + random() % letters));
      std::vector<uint32_t> ids;
      encoder->Encode(word, &ids);
      std::vector<std::string> symbols;
      for (const uint32_t id : ids) symbols.emplace_back(vocabulary.Bytes(id));
      ASSERT_EQ(symbols, NaiveMerge(word, merges)) << word;
    }
  }
}

}  // namespace
}  // namespace nibble
