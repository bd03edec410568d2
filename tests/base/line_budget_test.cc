#include "common/base/line_budget.h"

#include <gtest/gtest.h>

namespace nibble {
namespace {

using std::chrono::milliseconds;

TEST(LineBudget, SoManyASecondAndTheRestIsCounted) {
  LineBudget budget(3);
  const LineBudget::Clock::time_point start = LineBudget::Clock::now();
  uint64_t left_out = 99;
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(budget.Take(start + milliseconds(i), &left_out));
    EXPECT_EQ(left_out, 0u);
  }
  for (int i = 3; i < 1000; ++i) EXPECT_FALSE(budget.Take(start + milliseconds(i), &left_out));
  EXPECT_TRUE(budget.Take(start + milliseconds(1000), &left_out));
  EXPECT_EQ(left_out, 997u);
  EXPECT_TRUE(budget.Take(start + milliseconds(1001), &left_out));
  EXPECT_EQ(left_out, 0u) << "told once";
}

}  // namespace
}  // namespace nibble
