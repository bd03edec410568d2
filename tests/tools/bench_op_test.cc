// The operator benchmark on the CPU: its table, its checks, its report.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <sstream>

#include "kernels/cpu/cpu_ops.h"
#include "tools/bench/op.h"
#include "tools/bench/op_case.h"
#include "tools/bench/op_report.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

TEST(OpTableTest, FiltersAndNamesWhatDoesNotExist) {
  const auto all = SelectOps({});
  ASSERT_TRUE(all.ok());
  std::set<std::string> ops, models;
  for (const OpSpec& spec : *all) {
    ops.insert(spec.op);
    models.insert(spec.model.name);
  }
  EXPECT_EQ(ops.size(), 11u);
  EXPECT_EQ(models, std::set<std::string>{"70b"});
  const auto some = SelectOps({.ops = {"linear"}, .shapes = {"8b", "70b.tp2"}, .rows = {1, 7}});
  ASSERT_TRUE(some.ok());
  EXPECT_EQ(some->size(), 2u * 4 * 2);
  EXPECT_EQ(some->front().Shape(), "70b.tp2.qkv");
  EXPECT_EQ(some->front().model.ffn, 14336);
  EXPECT_THAT(std::string(SelectOps({.ops = {"linaer"}}).status().message()), HasSubstr("'linaer', must be some of linear"));
  EXPECT_THAT(std::string(SelectOps({.shapes = {"80b"}}).status().message()), HasSubstr("'80b', must be some of 70b"));
}

// Every operator runs, counts what it moves, and equals the specification, here on another number of threads.
TEST(OpCaseTest, EveryOperatorIsRightOnTheBundledModel) {
  const auto specs = SelectOps({.shapes = {"novelist.tp2"}, .rows = {3}});
  ASSERT_TRUE(specs.ok());
  const auto ops = CreateCpuOps({.threads = 2}), specification = CreateCpuOps({});
  for (const OpSpec& spec : *specs) {
    if (spec.context > 2048) continue;  // the same, longer
    SCOPED_TRACE(spec.op + " " + spec.Shape());
    const auto op = MakeOpCase({*ops, *specification, 1 << 16}, spec);
    ASSERT_TRUE(op.ok()) << op.status();
    EXPECT_EQ((*op)->Check(), "");
    EXPECT_GT((*op)->bytes, 0);
    (*op)->Issue(1);
  }
}

TEST(OpReportTest, SaysTimesRatiosAndWhatIsWrong) {
  OpRun run = {.date = "20261122-000000", .version = "0", .backend = "cuda:0", .device = "GPU", .driver = "13.0"};
  const std::vector<OpSpec> specs = *SelectOps({.ops = {"linear"}, .rows = {16}});
  run.results.push_back({.spec = specs[0], .us = 10, .bytes = 4e7, .operations = 2e9, .unit = OpUnit::kInt8, .limit_us = 8,
                         .bf16_us = 26, .fp8_us = 14});
  run.results.push_back({.spec = specs[1], .us = 10, .bytes = 4e7, .error = "[3, 4] is 1, not 2"});
  run.results.push_back({.spec = specs[2], .error = "no memory"});
  EXPECT_EQ(run.Failures(), 2);
  const std::string text = FormatOpReport(run);
  for (const char* part : {"4000", "2.60", "1.40", "80", "WRONG: [3, 4] is 1, not 2", "no memory", "2 NOT right",
                           "geometric mean of 1: 2.60 x bf16, 1.40 x fp8"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  const nlohmann::json json = OpReportJson(run);
  EXPECT_EQ(json["failures"], 2);
  EXPECT_EQ(json["results"][0]["cublas_fp8_us"], 14);
  EXPECT_EQ(json["results"][0]["unit"], "int8");
  EXPECT_EQ(json["results"][2]["error"], "no memory");
}

TEST(OpCommandTest, RefusesWhatIsNotThere) {
  std::ostringstream out, err;
  EXPECT_EQ(OpCommand({.filter = {.ops = {"nothing"}}}, "test", out, err), 2);
  EXPECT_EQ(OpCommand({.ops = {.backend = "tpu"}}, "test", out, err), 2);
  EXPECT_THAT(err.str(), HasSubstr("must be cpu or cuda"));
  EXPECT_EQ(OpCommand({.filter = {.ops = {"embed"}, .shapes = {"novelist"}, .rows = {2}}, .replays = 1}, "test", out, err), 0);
  EXPECT_THAT(out.str(), HasSubstr("every checked output right"));
}

}  // namespace
}  // namespace nibble
