// Speed of the text path on one core:
//   build/release/bin/nibble_tokenizer_benchmark      (from the repository's root)
// Encoding reports bytes per second; streaming, time per token.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "common/base/check.h"
#include "common/text/detokenizer.h"
#include "common/text/stop_matcher.h"
#include "common/text/tokenizer.h"

namespace nibble {
namespace {

constexpr size_t kMegabyte = 1'000'000;

std::string Prose() {
  std::ifstream file("deploy/models/text/heldout.txt", std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  NIBBLE_CHECK(text.size() > kMegabyte, "run from the repository's root");
  text.resize(kMegabyte);
  while (!text.empty() && (text.back() & 0x80) != 0) text.pop_back();
  return text;
}

const Tokenizer& BundledTokenizer() {
  static const std::unique_ptr<Tokenizer> tokenizer = [] {
    auto loaded = Tokenizer::Load("deploy/models/novelist-17m");
    NIBBLE_CHECK(loaded.ok(), loaded.status().ToString());
    return *std::move(loaded);
  }();
  return *tokenizer;
}

void BM_Load(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(Tokenizer::Load("deploy/models/novelist-17m"));
}
BENCHMARK(BM_Load)->Unit(benchmark::kMillisecond);

void BM_Encode(benchmark::State& state, const std::string& text) {
  const Tokenizer& tokenizer = BundledTokenizer();
  size_t tokens = 0;
  for (auto _ : state) {
    const auto ids = tokenizer.Encode(text);
    NIBBLE_CHECK(ids.ok(), ids.status().ToString());
    tokens = ids->size();
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
  state.counters["tokens"] = static_cast<double>(tokens);
}

std::string Repeat(const std::string& unit, size_t bytes) {
  std::string text;
  while (text.size() < bytes) text += unit;
  return text;
}

void BM_Stream(benchmark::State& state, std::vector<std::string> stops) {
  const Tokenizer& tokenizer = BundledTokenizer();
  const auto ids = tokenizer.Encode(Prose());
  NIBBLE_CHECK(ids.ok(), ids.status().ToString());
  Detokenizer detokenizer(&tokenizer);
  StopMatcher matcher(stops);
  size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(matcher.Append(detokenizer.Append((*ids)[i])));
    if (++i == ids->size()) i = 0;
  }
  state.SetItemsProcessed(state.iterations());
}

void Register() {
  const auto encode = [](const char* name, const std::string& text) {
    benchmark::RegisterBenchmark(name, BM_Encode, text)->Unit(benchmark::kMillisecond);
  };
  encode("BM_Encode/prose_1MB", Prose());
  encode("BM_Encode/prose_200B", Prose().substr(0, 200));
  encode("BM_Encode/one_letter_1MB", std::string(kMegabyte, 'a'));
  encode("BM_Encode/spaces_1MB", std::string(kMegabyte, ' '));
  encode("BM_Encode/line_feeds_1MB", std::string(kMegabyte, '\n'));
  encode("BM_Encode/digits_1MB", std::string(kMegabyte, '7'));
  encode("BM_Encode/words_without_spaces_1MB", Repeat("internationalization", kMegabyte));
  encode("BM_Encode/cjk_1MB", Repeat("永和九年歲在癸丑", kMegabyte));
  encode("BM_Encode/special_tokens_1MB", Repeat("<|eot_id|>", kMegabyte));
  encode("BM_Encode/almost_special_tokens_1MB", Repeat("<|eot_id|", kMegabyte));
  benchmark::RegisterBenchmark("BM_Stream/no_stop", BM_Stream, std::vector<std::string>{});
  benchmark::RegisterBenchmark("BM_Stream/four_stops", BM_Stream,
                               std::vector<std::string>{"\n\nQ:", "</answer>", "the quick brown fox jumps", "zzz"});
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  nibble::Register();
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
