// Sampling: what is chosen, how often, and log-probabilities.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

struct Sampled {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
  std::vector<int32_t> slots;
  std::vector<uint16_t> history;
};

struct Request {
  std::vector<float> logits;  // [rows, V]
  int64_t vocab = 0;
  std::vector<SampleRow> rows;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<int32_t> suppress_ids;
  std::vector<uint16_t> history;
};

class SamplingTest : public BackendTest {
 protected:
  static Sampled Run(Ops& ops, const Request& request) {
    const int64_t rows = static_cast<int64_t>(request.rows.size());
    Array<float> logits(ops, request.logits);
    Array<SampleRow> params(ops, request.rows);
    Array<int32_t> bias_ids(ops, request.bias_ids), suppress_ids(ops, request.suppress_ids);
    Array<float> bias_values(ops, request.bias_values);
    Array<uint16_t> history(ops, request.history);
    Array<int32_t> slots(ops, std::vector<int32_t>(4, -7));
    Array<int32_t> ids(ops, rows), top_ids(ops, rows * kMaxTopLogprobs);
    Array<float> logprobs(ops, rows), top_logprobs(ops, rows * kMaxTopLogprobs);
    ops.Sample({.logits = logits.data(),
                .rows = rows,
                .vocab = request.vocab,
                .params = params.data(),
                .bias_ids = bias_ids.data(),
                .bias_values = bias_values.data(),
                .suppress_ids = suppress_ids.data(),
                .history = history.data(),
                .slot_tokens = slots.data(),
                .token_ids = ids.data(),
                .logprobs = logprobs.data(),
                .top_ids = top_ids.data(),
                .top_logprobs = top_logprobs.data()});
    return {ids.Get(), logprobs.Get(), top_ids.Get(), top_logprobs.Get(), slots.Get(), history.Get()};
  }
  Sampled Run(const Request& request) { return Run(ops(), request); }
  int32_t One(const std::vector<float>& logits, const SampleRow& row) {
    return Run({.logits = logits, .vocab = static_cast<int64_t>(logits.size()), .rows = {row}}).ids[0];
  }

  // How often each id is drawn over `draws` positions.
  std::map<int32_t, int64_t> Count(const std::vector<float>& logits, SampleRow row, int64_t draws) {
    Request request{.vocab = static_cast<int64_t>(logits.size())};
    for (int64_t i = 0; i < draws; ++i) {
      request.logits.insert(request.logits.end(), logits.begin(), logits.end());
      row.position = static_cast<int32_t>(i);
      request.rows.push_back(row);
    }
    std::map<int32_t, int64_t> counts;
    for (int32_t id : Run(request).ids) ++counts[id];
    return counts;
  }
};

std::vector<float> Logs(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

// Wilson-Hilferty: how many standard deviations a chi-square statistic lies above its mean.
double ChiSquareZ(double chi_square, double degrees) {
  return (std::cbrt(chi_square / degrees) - (1 - 2 / (9 * degrees))) / std::sqrt(2 / (9 * degrees));
}

TEST_P(SamplingTest, GreedyTakesTheSmallestOfEquals) {
  std::vector<float> logits(1000, -1.0f);
  logits[17] = logits[400] = logits[999] = 2.0f;
  EXPECT_EQ(One(logits, {}), 17);
  logits[17] = std::nanf("");
  EXPECT_EQ(One(logits, {}), 400);
  logits[5] = INFINITY;
  EXPECT_EQ(One(logits, {}), 5);
  EXPECT_EQ(One(std::vector<float>(77, std::nanf("")), {}), 0);
  EXPECT_EQ(One(std::vector<float>(77, -INFINITY), {.temperature = 1.0f}), 0);
  EXPECT_EQ(One({-3.0f}, {.temperature = 0.7f, .top_p = 0.5f, .top_k = 1}), 0);
}

// Frequencies against probabilities, for vocabularies below, at and above the draw's blocks.
TEST_P(SamplingTest, DrawsFollowTheDistribution) {
  constexpr int64_t kDraws = 20000;
  for (int64_t vocab : {2, 5, 16, 63, 64, 65, 300}) {
    std::mt19937 random(static_cast<uint32_t>(vocab));
    std::vector<double> p(vocab);
    for (double& x : p) x = 0.2 + static_cast<double>(random() % 1000) / 1000;
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& x : p) x /= total;
    for (uint64_t seed : {uint64_t{0}, uint64_t{12345}, uint64_t{0xfedcba9876543210}}) {
      const auto counts = Count(Logs(p), {.temperature = 1.0f, .seed = seed}, kDraws);
      double chi_square = 0;
      for (int64_t i = 0; i < vocab; ++i) {
        const auto it = counts.find(static_cast<int32_t>(i));
        const double expected = p[i] * kDraws, observed = it == counts.end() ? 0 : static_cast<double>(it->second);
        chi_square += (observed - expected) * (observed - expected) / expected;
      }
      EXPECT_LT(ChiSquareZ(chi_square, static_cast<double>(vocab - 1)), 4.0) << "vocab " << vocab << " seed " << seed;
    }
  }
}

// Temperature: log p ratio halves at T = 2.
TEST_P(SamplingTest, TemperatureFlattens) {
  constexpr int64_t kDraws = 20000;
  const auto counts = Count(Logs({0.8, 0.2}), {.temperature = 2.0f, .seed = 3}, kDraws);
  const double want = std::sqrt(0.8) / (std::sqrt(0.8) + std::sqrt(0.2));
  EXPECT_NEAR(static_cast<double>(counts.at(0)) / kDraws, want, 0.012);
}

// A probability of 1e-4 is not lost: the draw's random numbers are fine enough.
TEST_P(SamplingTest, RareTokensAreDrawn) {
  constexpr int64_t kDraws = 60000;
  std::vector<double> p = {0.9999, 0.0001};
  const auto counts = Count(Logs(p), {.temperature = 1.0f, .seed = 4}, kDraws);
  const double rare = counts.contains(1) ? static_cast<double>(counts.at(1)) : 0;
  EXPECT_LE(rare, 20);
  EXPECT_GT(rare, 0);
}

TEST_P(SamplingTest, TopKKeepsExactlyK) {
  std::vector<float> logits(200, 0.0f);  // all equal: the k smallest ids
  for (int32_t k : {1, 2, 7, 64, 199}) {
    const auto counts = Count(logits, {.temperature = 1.0f, .seed = 5, .top_k = k}, 4000);
    EXPECT_LT(counts.rbegin()->first, k);
    EXPECT_GE(static_cast<int32_t>(counts.size()), std::min(k, 190)) << "k " << k;
  }
  for (int i = 0; i < 200; ++i) logits[i] = static_cast<float>(i % 10);  // ties of the best: 9, 19, 29, ...
  const auto counts = Count(logits, {.temperature = 5.0f, .seed = 6, .top_k = 3}, 2000);
  std::vector<int32_t> ids;
  for (const auto& [id, count] : counts) ids.push_back(id);
  EXPECT_EQ(ids, (std::vector<int32_t>{9, 19, 29}));
}

TEST_P(SamplingTest, TopPKeepsTheShortestPrefix) {
  const std::vector<float> logits = Logs({0.05, 0.4, 0.1, 0.3, 0.15});
  const auto kept = [&](float top_p) {
    std::vector<int32_t> ids;
    for (const auto& [id, count] : Count(logits, {.temperature = 1.0f, .top_p = top_p, .seed = 7}, 3000))
      ids.push_back(id);
    return ids;
  };
  EXPECT_EQ(kept(1e-6f), (std::vector<int32_t>{1}));
  EXPECT_EQ(kept(0.399f), (std::vector<int32_t>{1}));
  EXPECT_EQ(kept(0.401f), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(kept(0.699f), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(kept(0.701f), (std::vector<int32_t>{1, 3, 4}));
  EXPECT_EQ(kept(0.94f), (std::vector<int32_t>{1, 2, 3, 4}));
  EXPECT_EQ(kept(0.96f), (std::vector<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(kept(1.0f), (std::vector<int32_t>{0, 1, 2, 3, 4}));
  // Four equals of exactly a quarter: half of the mass is the two smallest ids.
  std::vector<int32_t> ids;
  for (const auto& [id, count] : Count({1, 1, 1, 1}, {.temperature = 1.0f, .top_p = 0.5f, .seed = 8}, 500)) {
    ids.push_back(id);
  }
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 1}));
}

// top-p counts what top-k left: of 0.4 and 0.3, the first alone is 0.57.
TEST_P(SamplingTest, TopPComesAfterTopK) {
  const std::vector<float> logits = Logs({0.05, 0.4, 0.1, 0.3, 0.15});
  const auto counts = Count(logits, {.temperature = 1.0f, .top_p = 0.55f, .seed = 9, .top_k = 2}, 500);
  EXPECT_EQ(counts.size(), 1u);
  EXPECT_TRUE(counts.contains(1));
}

TEST_P(SamplingTest, MinPIsRelativeToTheBest) {
  const std::vector<float> logits = Logs({0.5, 0.26, 0.24});
  EXPECT_EQ(Count(logits, {.temperature = 1.0f, .min_p = 0.5f, .seed = 10}, 1000).size(), 2u);
  EXPECT_EQ(Count(logits, {.temperature = 1.0f, .min_p = 0.45f, .seed = 10}, 1000).size(), 3u);
  EXPECT_EQ(Count(logits, {.temperature = 1.0f, .min_p = 1.0f, .seed = 10}, 100).size(), 1u);
}

// Truncation against a sort, on large vocabularies with many ties.
TEST_P(SamplingTest, TruncationEqualsASort) {
  std::mt19937 random(11);
  for (int64_t vocab : {130, 4096}) {
    std::vector<float> logits(vocab);
    for (float& x : logits) x = static_cast<float>(random() % 40) * 0.25f;
    for (float top_p : {0.1f, 0.5f, 0.9f, 0.99f}) {
      for (int32_t top_k : {0, 3, 50, 1000}) {
        std::vector<int32_t> order(vocab);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
        if (top_k > 0 && top_k < vocab) order.resize(top_k);
        double total = 0, cumulative = 0;
        for (int32_t id : order) total += std::exp(logits[id] - logits[order[0]]);
        size_t keep = 0;
        double slack = 0;
        while (keep < order.size() && cumulative < top_p * total) {
          slack = top_p * total - cumulative;
          cumulative += std::exp(logits[order[keep++]] - logits[order[0]]);
        }
        if (slack < 1e-5 * total || cumulative - top_p * total < 1e-5 * total) continue;  // too near to call
        order.resize(keep);
        std::vector<bool> allowed(vocab);
        for (int32_t id : order) allowed[id] = true;
        const auto counts = Count(logits, {.temperature = 1.0f, .top_p = top_p, .seed = 12, .top_k = top_k}, 60);
        for (const auto& [id, count] : counts) {
          EXPECT_TRUE(allowed[id]) << "vocab " << vocab << " top_p " << top_p << " top_k " << top_k << " id " << id;
        }
      }
    }
  }
}

TEST_P(SamplingTest, BiasSuppressionPenalties) {
  const std::vector<float> logits = {1.0f, 2.0f, 3.0f, -1.0f};
  Request request{.logits = logits, .vocab = 4, .rows = {{}}};
  request.bias_ids = {0, 0, 3};
  request.bias_values = {1.5f, 1.0f, 100.0f};
  request.suppress_ids = {3, 2};
  request.rows[0].bias_end = 2;
  EXPECT_EQ(Run(request).ids[0], 0);  // 1 + 1.5 + 1
  request.rows[0].bias_end = 3;
  EXPECT_EQ(Run(request).ids[0], 3);
  request.rows[0].suppress_end = 1;
  EXPECT_EQ(Run(request).ids[0], 0);
  request.suppress_ids = {0, 1, 2};
  request.rows[0].suppress_end = 3;
  EXPECT_EQ(Run(request).ids[0], 3);
  request.suppress_ids = {3, 1, 0, 2};
  request.rows[0].suppress_end = 4;
  EXPECT_EQ(Run(request).ids[0], 0);  // nothing is allowed: id 0

  // Prompt token 2 and output tokens 1, 1: repetition divides 3 and 2 by 4; frequency and presence touch token 1 only.
  request = {.logits = logits, .vocab = 4, .rows = {{.repetition_penalty = 4.0f, .history = 0}}};
  request.history = {0, 2, 0x8000, 0};
  Sampled got = Run(request);
  EXPECT_EQ(got.ids[0], 0);
  EXPECT_EQ(got.history, (std::vector<uint16_t>{1, 2, 0x8000, 0}));  // and the choice was counted
  request.rows[0].repetition_penalty = 1.0f;
  request.rows[0].frequency_penalty = -0.6f;
  EXPECT_EQ(Run(request).ids[0], 1);  // 2 + 1.2 > 3
  request.rows[0].presence_penalty = 0.3f;
  EXPECT_EQ(Run(request).ids[0], 2);  // 2 + 1.2 - 0.3 < 3
  request.rows[0] = {.repetition_penalty = 0.5f, .history = 0};
  request.logits = {-1.0f, -1.0f, -1.0f, -0.6f};
  EXPECT_EQ(Run(request).ids[0], 1);  // negative logits are multiplied: -0.5, the smaller of ids 1 and 2
}

TEST_P(SamplingTest, SlotsAndTargets) {
  const std::vector<float> logits = {0.0f, 1.0f, 5.0f, 2.0f, 1.0f, 0.0f};
  const Sampled got = Run({.logits = logits,
                           .vocab = 3,
                           .rows = {{.slot = 2}, {.slot = -1, .target = 1, .history = 0, .num_logprobs = 0}},
                           .history = {0, 0, 0}});
  EXPECT_EQ(got.ids, (std::vector<int32_t>{2, 1}));
  EXPECT_EQ(got.slots, (std::vector<int32_t>{-7, -7, 2, -7}));
  EXPECT_EQ(got.history, (std::vector<uint16_t>{0, 0, 0}));  // a scored token was not chosen
  const double sum = std::exp(2.0) + std::exp(1.0) + 1;
  EXPECT_NEAR(got.logprobs[1], 1 - std::log(sum), 1e-6);
}

TEST_P(SamplingTest, LogprobsAreOfTheRawLogits) {
  for (int64_t vocab : {1, 7, 20, 63, 100, 5000}) {
    const std::vector<float> logits = Values(Fill::kOutliers, vocab, 14);
    Request request{.logits = logits, .vocab = vocab};
    request.rows = {{.temperature = 0.5f, .seed = 1, .bias_begin = 0, .bias_end = 1}};
    request.rows[0].num_logprobs = 20;
    request.bias_ids = {0};
    request.bias_values = {1000.0f};  // the choice, but not its log-probability
    const Sampled got = Run(request);
    EXPECT_EQ(got.ids[0], 0);
    const double high = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float x : logits) sum += std::exp(x - high);
    const auto logprob = [&](int64_t id) { return logits[id] - high - std::log(sum); };
    EXPECT_NEAR(got.logprobs[0], logprob(0), 1e-5 * std::abs(logprob(0)) + 1e-5);
    std::vector<int32_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    for (int64_t i = 0; i < kMaxTopLogprobs; ++i) {
      if (i < vocab) {
        EXPECT_EQ(got.top_ids[i], order[i]);
        EXPECT_NEAR(got.top_logprobs[i], logprob(order[i]), 1e-5 * std::abs(logprob(order[i])) + 1e-5);
      } else {
        EXPECT_EQ(got.top_ids[i], -1);
        EXPECT_EQ(got.top_logprobs[i], -INFINITY);
      }
    }
  }
}

TEST_P(SamplingTest, TopLogprobsBreakTiesByIdAndSurviveBadLogits) {
  std::vector<float> logits(100, 0.0f);
  logits[60] = 1;
  logits[3] = std::nanf("");
  const Sampled got = Run({.logits = logits, .vocab = 100, .rows = {{.target = 3, .num_logprobs = 4}}});
  EXPECT_EQ(std::vector<int32_t>(got.top_ids.begin(), got.top_ids.begin() + 5),
            (std::vector<int32_t>{60, 0, 1, 2, -1}));
  EXPECT_EQ(got.logprobs[0], -INFINITY);
  for (float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    const Sampled all =
        Run({.logits = std::vector<float>(100, bad),
             .vocab = 100,
             .rows = {{.temperature = 0.8f, .top_p = 0.9f, .min_p = 0.1f, .seed = 1, .top_k = 5, .num_logprobs = 3}}});
    EXPECT_GE(all.ids[0], 0);
    EXPECT_LT(all.ids[0], 100);
    EXPECT_FALSE(std::isnan(all.logprobs[0]));
  }
}

// Philox4x32-10 known answer (Random123's kat_vectors: all-zero key and counter) seen through the definition of the
// draw: id 0 of seed 0, position 0 uses word 0 = 0x6627e8d5.
TEST_P(SamplingTest, TheRandomStreamIsPhilox) {
  const uint32_t zero_counter[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  double gumbel[4];
  for (int word = 0; word < 4; ++word) {
    const double v = static_cast<double>(zero_counter[word] >> 1) * 0x1p-31 + 0x1p-32;
    gumbel[word] = -std::log(-std::log1p(-v));
  }
  // Ids 0, 16, 32, 48 take the four words of counter 0. With all others impossible, the id with the largest sum of
  // logit and Gumbel number wins; probe each pair around the tie.
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 4; ++b) {
      if (a == b) continue;
      for (double margin : {-1e-4, 1e-4}) {
        std::vector<float> logits(64, -INFINITY);
        logits[16 * a] = 0;
        logits[16 * b] = static_cast<float>(gumbel[a] - gumbel[b] + margin);
        EXPECT_EQ(One(logits, {.temperature = 1.0f}), margin > 0 ? 16 * b : 16 * a) << a << " " << b << " " << margin;
      }
    }
  }
}

// Rows do not depend on the batch, and every backend chooses the specification's ids with the specification's bits.
TEST_P(SamplingTest, EqualsTheSpecification) {
  constexpr int64_t kVocab = 1000, kRows = 64;
  Request request{.logits = Values(Fill::kOutliers, kVocab * kRows, 15), .vocab = kVocab};
  for (float& x : request.logits) x *= 0.2f;
  for (int64_t i = 0; i < kRows; ++i) {
    SampleRow row{
        .temperature = i % 5 * 0.4f, .seed = static_cast<uint64_t>(i) << 30, .position = static_cast<int32_t>(i)};
    row.top_p = i % 3 == 0 ? 0.9f : 1.0f;
    row.top_k = i % 4 == 0 ? 40 : 0;
    row.min_p = i % 7 == 0 ? 0.05f : 0.0f;
    row.num_logprobs = static_cast<int32_t>(i % 22) - 1;
    row.target = i % 11 == 0 ? 5 : -1;
    request.rows.push_back(row);
  }
  const Sampled want = Run(*AllBackends()[0].ops, request), got = Run(request);
  EXPECT_EQ(got.ids, want.ids);
  for (int64_t i = 0; i < kRows; ++i) {
    if (request.rows[i].num_logprobs < 0) continue;
    EXPECT_EQ(std::bit_cast<uint32_t>(got.logprobs[i]), std::bit_cast<uint32_t>(want.logprobs[i])) << "row " << i;
    for (int64_t j = i * 20; j < i * 20 + 20; ++j) {
      EXPECT_EQ(got.top_ids[j], want.top_ids[j]);
      EXPECT_EQ(got.top_logprobs[j], want.top_logprobs[j]);
    }
    Request alone{.logits = {request.logits.begin() + i * kVocab, request.logits.begin() + (i + 1) * kVocab},
                  .vocab = kVocab,
                  .rows = {request.rows[i]}};
    const Sampled one = Run(alone);
    EXPECT_EQ(one.ids[0], want.ids[i]);
    EXPECT_EQ(one.logprobs[0], want.logprobs[i]);
  }
}

TEST_P(SamplingTest, RecordHistoryCountsPromptAndOutput) {
  Array<uint16_t> history(ops(), std::vector<uint16_t>(10, 0x1234));
  Array<int32_t> ids(ops(), {3, 4, 3, 4, 4, 9});
  ops().RecordHistory({.history = history.data(), .vocab = 10, .token_ids = ids.data(), .count = 6, .num_prompt = 3});
  EXPECT_EQ(history.Get(), (std::vector<uint16_t>{0, 0, 0, 0x8000, 0x8002, 0, 0, 0, 0, 1}));
  ops().RecordHistory({.history = history.data(), .vocab = 10});
  EXPECT_EQ(history.Get(), std::vector<uint16_t>(10, 0));
  // The count saturates below the prompt's bit.
  const std::vector<int32_t> many(40000, 2);
  Array<int32_t> many_ids(ops(), many);
  ops().RecordHistory({.history = history.data(), .vocab = 10, .token_ids = many_ids.data(), .count = 40000});
  EXPECT_EQ(history.Get()[2], 0x7fff);
}

INSTANTIATE_TEST_SUITE_P(All, SamplingTest, ::testing::ValuesIn(AllBackends()),
                         [](const auto& backend) { return backend.param.name; });

}  // namespace
}  // namespace nibble::testing
