#include "common/base/progress.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace nibble {
namespace {

const ProgressOptions kTensors{.label = "quantize", .unit = "tensors", .total = 120};

std::string Contents(FILE* file) {
  std::string text;
  std::rewind(file);
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
  return text;
}

TEST(FormatProgressTest, SaysCountShareRateTimeLeftAndNote) {
  EXPECT_EQ(FormatProgress(kTensors, 30, 2.0, "layer.3", 0, false),
            "quantize  30/120 tensors  25%  15.0 tensors/s  0:06 left  layer.3");
}

TEST(FormatProgressTest, NothingDoneYetHasNoRate) {
  EXPECT_EQ(FormatProgress(kTensors, 0, 2.0, {}, 0, false), "quantize  0/120 tensors  0%  --:-- left");
}

TEST(FormatProgressTest, UnknownTotalHasNoShareAndNoTimeLeft) {
  EXPECT_EQ(FormatProgress({.label = "read", .unit = "lines", .total = 0}, 500, 1.0, {}, 10, false),
            "read  500 lines  500 lines/s");
}

TEST(FormatProgressTest, MoreThanTotalStaysAtHundred) {
  EXPECT_EQ(FormatProgress({.label = "x", .unit = "u", .total = 2}, 3, 1.0, {}, 4, false),
            "x  ━━━━  3/2 u  100%  3.00 u/s");
}

TEST(FormatProgressTest, NotFullUntilDone) {
  EXPECT_NE(FormatProgress({.label = "x", .unit = "u", .total = 1000}, 999, 1.0, {}, 4, false).find(" 99%"),
            std::string::npos);
}

TEST(FormatClockTest, MinutesHoursAndUnknown) {
  EXPECT_EQ(FormatClock(7.4), "0:07");
  EXPECT_EQ(FormatClock(725), "12:05");
  EXPECT_EQ(FormatClock(10841), "3:00:41");
  EXPECT_EQ(FormatClock(-1), "--:--");
  EXPECT_EQ(FormatClock(std::numeric_limits<double>::infinity()), "--:--");
}

TEST(FormatRateTest, ThreeDigitsThatMatter) {
  EXPECT_EQ(FormatRate(0.5), "0.50");
  EXPECT_EQ(FormatRate(12.34), "12.3");
  EXPECT_EQ(FormatRate(1830), "1830");
  EXPECT_EQ(FormatRate(17200), "17.2k");
  EXPECT_EQ(FormatRate(3.14e6), "3.1M");
  EXPECT_EQ(FormatRate(std::numeric_limits<double>::quiet_NaN()), "-");
}

TEST(ProgressTest, PlainStreamGetsWholeLinesAndATotal) {
  FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  {
    Progress progress({.label = "eval", .unit = "windows", .total = 3, .stream = file, .plain_period_s = 0});
    for (int i = 0; i < 3; ++i) progress.Add(1, "w");
    progress.Finish();
    progress.Finish();
  }
  const std::string text = Contents(file);
  std::fclose(file);
  EXPECT_EQ(text.find('\x1b'), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4) << text;
  EXPECT_NE(text.rfind("3/3 windows  100%"), std::string::npos) << text;
  EXPECT_NE(text.rfind(" in "), std::string::npos) << text;
}

TEST(ProgressTest, ShortJobWritesNothingToAPlainStream) {
  FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  {
    Progress progress({.label = "eval", .unit = "windows", .total = 3, .stream = file, .plain_period_s = 3600});
    progress.Add(3);
    progress.Finish();
  }
  EXPECT_EQ(Contents(file), "");
  std::fclose(file);
}

TEST(ProgressTest, CountsFromManyThreads) {
  FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  {
    Progress progress({.label = "n", .unit = "items", .total = 4000, .stream = file, .plain_period_s = 0});
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&progress] {
        for (int i = 0; i < 1000; ++i) progress.Add(1, "thread");
      });
    }
    for (std::thread& thread : threads) thread.join();
    progress.Finish();
  }
  EXPECT_NE(Contents(file).find("4000/4000 items"), std::string::npos);
  std::fclose(file);
}

}  // namespace
}  // namespace nibble
