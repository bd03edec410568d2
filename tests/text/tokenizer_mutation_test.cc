// Thousands of damaged tokenizer files: loading gives a status or a tokenizer that works; nothing crashes, nothing
// hangs.
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <string>

#include "common/text/detokenizer.h"
#include "common/text/tokenizer.h"
#include "tests/text/fixtures.h"

namespace nibble {
namespace {

constexpr int kRounds = 4000;
constexpr auto kTimeLimit = std::chrono::seconds(45);  // fewer rounds under sanitizers, never an endless test

std::string Mutate(std::string text, std::mt19937* random) {
  const auto below = [&](size_t n) { return (*random)() % n; };
  const int count = 1 + below(3);
  for (int i = 0; i < count; ++i) {
    // Half of the damage falls on the first two kilobytes: structure, not vocabulary.
    const size_t at = below(2) == 0 ? below(2000) : below(text.size());
    switch (below(6)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text[at] = "0123456789-\"[]{},:\\tfn"[below(22)];
        break;
      case 2:
        text.erase(at, 1 + below(8));
        break;
      case 3:
        text.insert(at, text.substr(below(text.size()), below(40)));
        break;
      case 4:
        text.resize(text.size() - below(64));
        break;
      case 5: {  // shuffle a word of the file to another place: wrong types, unknown names
        const size_t from = text.find('"', below(text.size()));
        if (from != std::string::npos) text.insert(at, text.substr(from, text.find('"', from + 1) - from));
        break;
      }
    }
  }
  return text;
}

TEST(TokenizerMutationTest, DamagedFilesNeverCrash) {
  const auto start = std::chrono::steady_clock::now();
  std::mt19937 random(20);
  int loaded = 0, refused = 0;
  for (const char* name : {"gpt2_prefix", "stages", "qwen2"}) {
    const std::string original = ReadText(std::string("tests/text/data/") + name + ".tokenizer.json");
    for (int round = 0; round < kRounds / 3 && std::chrono::steady_clock::now() - start < kTimeLimit; ++round) {
      const auto tokenizer = Tokenizer::FromJson(Mutate(original, &random));
      if (!tokenizer.ok()) {
        ++refused;
        EXPECT_FALSE(tokenizer.status().message().empty());
        continue;
      }
      ++loaded;
      const auto ids = (*tokenizer)->Encode("Don't   panic: <mask> x² = 12345\n\n日本語 e\u0301té <|endoftext|>!");
      if (!ids.ok()) continue;
      const auto text = (*tokenizer)->Decode(*ids, false);
      ASSERT_TRUE(text.ok()) << text.status();
      Detokenizer detokenizer(tokenizer->get(), {.skip_special_tokens = false});
      std::string streamed;
      for (const uint32_t id : *ids) streamed += detokenizer.Append(id);
      streamed += detokenizer.Finish();
      ASSERT_EQ(streamed, *text);
    }
  }
  // Both outcomes must have been exercised.
  EXPECT_GT(loaded, 10);
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace nibble
