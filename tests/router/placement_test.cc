#include "router/placement.h"

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"
#include "router/prefix_index.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ReplicaSnapshot Ready(uint32_t replica, uint32_t running = 0, uint32_t cached_prefix_tokens = 0) {
  return {.replica = replica,
          .ready = true,
          .running = running,
          .max_sequences = 256,
          .free_pages = 10000,
          .total_pages = 10000,
          .cached_prefix_tokens = cached_prefix_tokens};
}

TEST(PickReplica, SaysUnavailableWithRetryInfoWhenNoneIsReady) {
  const ReplicaSnapshot down[2] = {{.replica = 0}, {.replica = 1}};
  const absl::Status status = PickReplica(down, {.num_prompt_tokens = 10}, absl::Milliseconds(1500)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no replica is ready (2 configured), retry in 1.5s"));
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(status.GetPayload(kRetryInfoTypeUrl).has_value());
  ASSERT_TRUE(retry.ParseFromString(std::string(*status.GetPayload(kRetryInfoTypeUrl))));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
  EXPECT_EQ(PickReplica({}, {}).status().code(), absl::StatusCode::kUnavailable);
}

TEST(PickReplica, PassesOverReplicasThatAreNotReady) {
  ReplicaSnapshot replicas[2] = {Ready(0), Ready(1, 100)};
  replicas[0].ready = false;
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 10}), 1u);
}

TEST(PickReplica, BalancesWithoutPrefixes) {
  const ReplicaSnapshot replicas[3] = {Ready(0, 5), Ready(1, 3), Ready(2, 4)};
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 100}), 1u);
  ReplicaSnapshot waiting[2] = {Ready(0, 3), Ready(1, 3)};
  waiting[0].waiting_prompt_tokens = 5000;
  EXPECT_EQ(*PickReplica(waiting, {.num_prompt_tokens = 100}), 1u);
  const ReplicaSnapshot equal[2] = {Ready(0, 3), Ready(1, 3)};
  EXPECT_EQ(*PickReplica(equal, {.num_prompt_tokens = 100}), 0u) << "ties go to the smallest id";
}

TEST(PickReplica, FollowsAPrefixAsFarAsItSavesRows) {
  const PlacementRequest request = {.num_prompt_tokens = 4000};
  const ReplicaSnapshot near[2] = {Ready(0, 10), Ready(1, 20, 3968)};
  EXPECT_EQ(*PickReplica(near, request), 1u) << "10 neighbours more cost less than 3968 rows";
  const ReplicaSnapshot far[2] = {Ready(0, 10), Ready(1, 40, 3968)};
  EXPECT_EQ(*PickReplica(far, request), 0u) << "30 neighbours more cost more";
  const ReplicaSnapshot small[2] = {Ready(0, 10), Ready(1, 11, 64)};
  EXPECT_EQ(*PickReplica(small, {.num_prompt_tokens = 65}), 0u) << "one page saved is not worth a neighbour";
}

TEST(PickReplica, NeverQueuesBehindAPrefixWhenAnotherReplicaHasRoom) {
  ReplicaSnapshot replicas[2] = {Ready(0, 256, 100000), Ready(1, 255)};
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 100001}), 1u) << "no slot";
  replicas[0] = Ready(0, 1, 0);
  replicas[0].free_pages = 10;
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 1000}), 1u) << "no pages";
  replicas[0].cached_prefix_tokens = 960;
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 1000}), 0u) << "cached pages need no room";
  EXPECT_EQ(*PickReplica(replicas, {.num_prompt_tokens = 1000, .num_sequences = 2}), 0u)
      << "255 + 2 do not fit into 256 slots";
}

// The "death spiral" of affinity without a guard: everybody shares one prefix that only replica 0 has.
TEST(PickReplica, AHotPrefixSpreadsOverReplicas) {
  std::vector<ReplicaSnapshot> replicas = {Ready(0, 0, 960), Ready(1), Ready(2), Ready(3)};
  for (int i = 0; i < 400; ++i) {
    const uint32_t chosen = *PickReplica(replicas, {.num_prompt_tokens = 1000});
    ++replicas[chosen].running;
    replicas[chosen].cached_prefix_tokens = 960;
  }
  for (const ReplicaSnapshot& replica : replicas) EXPECT_NEAR(replica.running, 100, 4);
}

TEST(PrefixChain, OneHashPerWholePageNeverTheLastToken) {
  const std::vector<uint32_t> tokens(129, 5);
  EXPECT_EQ(PrefixChain(tokens, "", 64).size(), 2u);
  EXPECT_EQ(PrefixChain(absl::MakeConstSpan(tokens).first(128), "", 64).size(), 1u);
  EXPECT_EQ(PrefixChain(absl::MakeConstSpan(tokens).first(64), "", 64).size(), 0u);
  EXPECT_EQ(PrefixChain({}, "", 64).size(), 0u);
  const auto chain = PrefixChain(tokens, "", 64);
  EXPECT_NE(chain[0], chain[1]) << "equal pages at different depths";
  EXPECT_NE(chain[0], PrefixChain(tokens, "salt", 64)[0]);
  EXPECT_EQ(chain[0], PrefixChain(absl::MakeConstSpan(tokens).first(65), "", 64)[0]);
}

TEST(PrefixIndex, RemembersPerReplicaAndForgetsOnReset) {
  PrefixIndex index(2);
  const uint64_t chain[3] = {1, 2, 3};
  index.Placed(0, chain);
  EXPECT_THAT(index.MatchedPages(chain), ElementsAre(0, 0)) << "no capacity before Reset";
  index.Reset(0, 10);
  index.Reset(1, 10);
  index.Placed(0, chain);
  index.Placed(1, absl::MakeConstSpan(chain).first(1));
  EXPECT_THAT(index.MatchedPages(chain), ElementsAre(3, 1));
  const uint64_t other[2] = {1, 9};
  EXPECT_THAT(index.MatchedPages(other), ElementsAre(1, 1));
  index.Reset(0, 0);
  EXPECT_THAT(index.MatchedPages(chain), ElementsAre(0, 1));
}

TEST(PrefixIndex, IsBoundedAndForgetsOldTailsFirst) {
  PrefixIndex index(1);
  index.Reset(0, 4);
  const uint64_t old_chain[3] = {1, 2, 3}, new_chain[2] = {11, 12},
                 long_chain[9] = {21, 22, 23, 24, 25, 26, 27, 28, 29};
  index.Placed(0, old_chain);
  index.Placed(0, new_chain);
  EXPECT_EQ(index.size(0), 4u);
  EXPECT_THAT(index.MatchedPages(old_chain), ElementsAre(2)) << "its tail went";
  EXPECT_THAT(index.MatchedPages(new_chain), ElementsAre(2));
  index.Placed(0, old_chain);
  EXPECT_THAT(index.MatchedPages(old_chain), ElementsAre(3));
  EXPECT_THAT(index.MatchedPages(new_chain), ElementsAre(1));
  index.Placed(0, long_chain);
  EXPECT_EQ(index.size(0), 4u);
  EXPECT_THAT(index.MatchedPages(long_chain), ElementsAre(4)) << "the head of what does not fit";
}

TEST(PrefixIndex, MayBeUsedFromManyThreads) {
  PrefixIndex index(2);
  index.Reset(0, 100);
  index.Reset(1, 100);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&index, t] {
      for (uint64_t i = 0; i < 500; ++i) {
        const uint64_t chain[3] = {i % 50, 1000 + i % 50, 2000 + i};
        index.Placed(static_cast<uint32_t>(t % 2), chain);
        for (const uint32_t pages : index.MatchedPages(chain)) EXPECT_LE(pages, 3u);
        if (i % 100 == 99 && t == 0) index.Reset(0, 100);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(index.size(0), 100u);
}

}  // namespace
}  // namespace nibble
