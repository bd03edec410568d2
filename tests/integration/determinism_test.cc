// The tokens of a request are a function of the request alone: not of the batch around it, the chunking of its
// prefill, cached prefixes, preemption, the replica that ran it, or run-ahead. Bit for bit, log-probabilities included.
#include <gtest/gtest.h>

#include "tests/integration/cluster.h"

namespace nibble::testing {
namespace {

constexpr uint32_t kRequests = kSanitized ? 40 : 208;
constexpr uint32_t kMaxPrompt = kSanitized ? 300 : 700;
constexpr int kMaxOutput = 48;
constexpr uint64_t kSeed = 20240611;

struct Reference {
  std::vector<v1::GenerateRequest> requests;
  std::vector<Generation> alone;   // one after the other, no prefix cache, no run-ahead, whole-prompt chunks
};

const Reference& Alone() {
  static const Reference* reference = [] {
    Cluster cluster({.router_flags = {"--prefix-cache", "off", "--run-ahead", "off", "--max-prefill-chunk", "2048"}});
    auto* r = new Reference;
    r->requests = VariedRequests(cluster, kRequests, kMaxPrompt, kMaxOutput, kSeed);
    r->alone = GenerateAll(cluster, r->requests, 1);
    return r;
  }();
  return *reference;
}

void ExpectSame(const std::vector<Generation>& actual, const std::string& what) {
  const Reference& reference = Alone();
  ASSERT_EQ(actual.size(), reference.alone.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    SCOPED_TRACE(what + ", request " + std::to_string(i) + ": " + reference.requests[i].sampling_params().ShortDebugString());
    const Generation& a = actual[i];
    const Generation& b = reference.alone[i];
    ASSERT_TRUE(b.status.ok()) << b.status.error_message();
    ASSERT_TRUE(a.status.ok()) << a.status.error_message();
    ASSERT_EQ(a.sequences.size(), b.sequences.size());
    for (size_t s = 0; s < a.sequences.size(); ++s) {
      EXPECT_TRUE(a.sequences[s].finished);
      EXPECT_EQ(a.sequences[s].ids, b.sequences[s].ids);
      EXPECT_EQ(a.sequences[s].text, b.sequences[s].text);
      EXPECT_EQ(a.sequences[s].logprobs, b.sequences[s].logprobs);
      EXPECT_EQ(a.sequences[s].finish.finish_reason(), b.sequences[s].finish.finish_reason());
      EXPECT_EQ(a.sequences[s].finish.usage().completion_tokens(), b.sequences[s].finish.usage().completion_tokens());
    }
  }
}

uint32_t Sum(const std::vector<Generation>& generations, uint32_t (v1::Usage::*field)() const) {
  uint32_t sum = 0;
  for (const auto& g : generations)
    for (const auto& s : g.sequences) sum += (s.finish.usage().*field)();
  return sum;
}

TEST(Determinism, RequestsAreVariedAndComplete) {
  uint32_t stops = 0, lengths = 0, tokens = 0;
  for (const auto& g : Alone().alone) {
    ASSERT_TRUE(g.status.ok()) << g.status.error_message();
    for (const auto& s : g.sequences) {
      ASSERT_TRUE(s.finished);
      (s.finish.finish_reason() == v1::FINISH_REASON_STOP ? stops : lengths) += 1;
      tokens += s.finish.usage().completion_tokens();
    }
  }
  EXPECT_GT(stops, kRequests / 30);
  EXPECT_GT(lengths, kRequests * 12 / 25);
  EXPECT_GT(tokens, kRequests * 10);
}

TEST(Determinism, Among31Others) {
  Cluster cluster({.router_flags = {"--prefix-cache", "off", "--run-ahead", "off"}});
  ExpectSame(GenerateAll(cluster, Alone().requests, 32), "among 31 others");
}

TEST(Determinism, RunAhead) {
  Cluster cluster({.router_flags = {"--prefix-cache", "off", "--run-ahead", "on"}});
  ExpectSame(GenerateAll(cluster, Alone().requests, 32), "run-ahead");
}

class ChunkSize : public ::testing::TestWithParam<int> {};
TEST_P(ChunkSize, SameTokens) {
  const std::string chunk = std::to_string(GetParam());
  Cluster cluster({.router_flags = {"--prefix-cache", "off", "--max-prefill-chunk", chunk}});
  ExpectSame(GenerateAll(cluster, Alone().requests, 16), "chunk " + chunk);
}
INSTANTIATE_TEST_SUITE_P(Determinism, ChunkSize, ::testing::Values(16, 100, 256, 2048));

TEST(Determinism, PrefixCacheOnAndHit) {
  Cluster cluster({.router_flags = {"--prefix-cache", "on"}});
  ExpectSame(GenerateAll(cluster, Alone().requests, 16), "prefix cache, first time");
  const auto again = GenerateAll(cluster, Alone().requests, 16);
  EXPECT_GT(Sum(again, &v1::Usage::cached_tokens), kRequests * kMaxPrompt / 8) << "the second round was meant to hit";
  ExpectSame(again, "prefix cache, hit");
}

TEST(Determinism, Preempted) {
  // 56 pages, and ahead of all others sixteen requests that grow by four pages each: of those that fit at first, somebody
  // has to give way.
  Cluster cluster({.kv_memory = "2MiB", .router_flags = {"--max-sequences", "32"}});
  ASSERT_LT(cluster.Status().replicas(0).total_pages(), 100u);
  std::vector<v1::GenerateRequest> requests;
  for (int i = 0; i < 16; ++i) {
    requests.push_back(Alone().requests[static_cast<size_t>(i)]);
    requests.back().set_request_id("long-" + std::to_string(i));
    requests.back().mutable_sampling_params()->Clear();
    requests.back().mutable_sampling_params()->set_max_tokens(256);
    requests.back().mutable_sampling_params()->set_ignore_eos(true);
  }
  const auto grown = static_cast<std::ptrdiff_t>(requests.size());
  requests.insert(requests.end(), Alone().requests.begin(), Alone().requests.end());
  auto generations = GenerateAll(cluster, requests, 32);
  EXPECT_GT(Sum(generations, &v1::Usage::preemptions), 0u) << "the pool was meant to be too small";
  generations.erase(generations.begin(), generations.begin() + grown);
  ExpectSame(generations, "preempted");
}

TEST(Determinism, AnyReplica) {
  Cluster cluster({.replicas = 2});
  ExpectSame(GenerateAll(cluster, Alone().requests, 16), "two replicas");
  const auto status = cluster.Status();
  for (const auto& replica : status.replicas()) EXPECT_GT(replica.steps(), 50u) << "both were meant to work";
}

}  // namespace
}  // namespace nibble::testing
