#include "common/base/thread_pool.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace nibble {
namespace {

TEST(ThreadPool, RunsEveryItemOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t items : {0, 1, 2, 3, 100, 1000}) {
      std::vector<int> times(items, 0);  // plain ints: items do not share them
      pool.ParallelFor(items, [&](int64_t item, int) { ++times[item]; });
      EXPECT_EQ(times, std::vector<int>(items, 1)) << threads << " threads";
    }
  }
}

TEST(ThreadPool, ThreadsKeepTheirScratchApart) {
  ThreadPool pool(4);
  std::vector<int64_t> sums(pool.threads() * 64);  // one plain counter per thread, a cache line apart
  for (int round = 0; round < 200; ++round) {
    pool.ParallelFor(97, [&](int64_t item, int thread) { sums[thread * 64] += item; });
  }
  int64_t total = 0;
  for (int64_t sum : sums) total += sum;
  EXPECT_EQ(total, 200 * 97 * 96 / 2);
}

// What one loop wrote, the next one sees, whoever runs which item.
TEST(ThreadPool, LoopsFollowEachOther) {
  ThreadPool pool(3);
  std::vector<int64_t> values(50, 0), next(50);
  for (int round = 0; round < 500; ++round) {
    pool.ParallelFor(50, [&](int64_t item, int) { next[item] = values[(item + 1) % 50] + 1; });
    pool.ParallelFor(50, [&](int64_t item, int) { values[item] = next[item]; });
  }
  EXPECT_EQ(values, std::vector<int64_t>(50, 500));
}

TEST(ThreadPool, OneThreadIsAPlainLoop) {
  ThreadPool pool(1);
  std::vector<int64_t> order;
  pool.ParallelFor(4, [&](int64_t item, int thread) {
    EXPECT_EQ(thread, 0);
    order.push_back(item);
  });
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3}));
}

}  // namespace
}  // namespace nibble
