#include "common/model/writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/model/tiny_model.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using ::nibble::testing::TempDir;
using ::testing::HasSubstr;

const std::vector<TensorSpec> kSpecs = {
    {"a", TensorType::kF32, {2, 2}}, {"b", TensorType::kU8, {3}}, {"c", TensorType::kI32, {2}}};

absl::Status WriteModel(const std::string& dir, const ModelWriterOptions& options, float value = 1) {
  NIBBLE_ASSIGN_OR_RETURN(const auto writer, ModelWriter::Create(dir, kSpecs, options));
  NIBBLE_RETURN_IF_ERROR(writer->Write("c", std::vector<int32_t>{-7, 7}));
  NIBBLE_RETURN_IF_ERROR(writer->Write("a", std::vector<float>{value, 2, 3, 4}));
  NIBBLE_RETURN_IF_ERROR(writer->Write("b", std::vector<uint8_t>{1, 2, 3}));
  NIBBLE_RETURN_IF_ERROR(writer->WriteFile("config.json", "{}"));
  return writer->Commit();
}

float FirstValue(const std::string& dir) {
  const auto file = SafeTensors::Open(dir);
  NIBBLE_CHECK(file.ok(), file.status().ToString());
  float value;
  std::memcpy(&value, (*file)->Get("a")->data, 4);
  return value;
}

size_t Entries(const std::string& dir) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(dir), fs::directory_iterator()));
}

TEST(ModelWriter, RoundTrips) {
  TempDir dir;
  for (const int64_t shard_bytes : {int64_t{1} << 30, int64_t{16}, int64_t{1}}) {
    ModelWriterOptions options;
    options.overwrite = true;
    options.max_shard_bytes = shard_bytes;
    const absl::Status status = WriteModel(dir / "m", options);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(Entries(dir.path()), 1u);
    EXPECT_EQ(Entries(dir / "m"), shard_bytes > 100 ? 2u : shard_bytes == 16 ? 4u : 5u);
    const auto file = SafeTensors::Open(dir / "m");
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->tensors().size(), 3u);
    const int64_t shape[] = {2};
    const auto c = (*file)->Get("c", TensorType::kI32, shape);
    ASSERT_TRUE(c.ok()) << c.status();
    int32_t values[2];
    std::memcpy(values, c->data, 8);
    EXPECT_EQ(values[0], -7);
    EXPECT_EQ(FirstValue(dir / "m"), 1);
  }
}

TEST(ModelWriter, ReplacesOnlyWhenAskedAndOnlyModels) {
  TempDir dir;
  ASSERT_TRUE(WriteModel(dir / "m", {}).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(WriteModel(dir / "m", {}, 9)));
  EXPECT_EQ(FirstValue(dir / "m"), 1);
  ASSERT_TRUE(WriteModel((dir / "m") + "/", {.overwrite = true}, 9).ok());
  EXPECT_EQ(FirstValue(dir / "m"), 9);

  fs::create_directory(dir / "home");
  std::ofstream(dir / "home/letters.txt") << "dear";
  EXPECT_TRUE(absl::IsFailedPrecondition(WriteModel(dir / "home", {.overwrite = true})));
  std::ofstream(dir / "home/config.json") << "{}";
  fs::create_directory(dir / "home/photos");
  EXPECT_TRUE(absl::IsFailedPrecondition(WriteModel(dir / "home", {.overwrite = true})));
  fs::create_symlink(dir / "m", dir / "link");
  EXPECT_TRUE(absl::IsFailedPrecondition(WriteModel(dir / "link", {.overwrite = true})));
  EXPECT_EQ(Entries(dir.path()), 3u);
}

TEST(ModelWriter, LeavesNothingWithoutCommit) {
  TempDir dir;
  {
    const auto writer = ModelWriter::Create(dir / "m", kSpecs, {});
    ASSERT_TRUE(writer.ok());
    EXPECT_EQ(Entries(dir.path()), 1u);
    ASSERT_TRUE((*writer)->Write("b", std::vector<uint8_t>{1, 2, 3}).ok());
  }
  EXPECT_EQ(Entries(dir.path()), 0u);
}

TEST(ModelWriter, MakesMissingParents) {
  TempDir dir;
  ASSERT_TRUE(WriteModel(dir / "no/such/m", {}).ok());
  EXPECT_EQ(FirstValue(dir / "no/such/m"), 1);
  const absl::Status status = WriteModel(dir / "no/such/m/config.json/m", {});
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("no/such/m/config.json"));
}

// A file size limit acts like a full disk: the error comes before the work, names file and bytes, and cleans up.
TEST(ModelWriter, ReportsLackOfSpace) {
  TempDir dir;
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 64 << 10;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = ModelWriter::Create(dir / "m", {{"big", TensorType::kU8, {1 << 20}}}, {}).status();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("reserve 1048"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("m/model.safetensors"));
  EXPECT_EQ(Entries(dir.path()), 0u);
}

TEST(ModelWriterDeathTest, MisuseIsABug) {
  TempDir dir;
  const auto writer = ModelWriter::Create(dir / "m", kSpecs, {});
  ASSERT_TRUE(writer.ok());
  EXPECT_DEATH((*writer)->Write("b", std::vector<uint8_t>{1}).IgnoreError(), "1 vs 3");
  EXPECT_DEATH((*writer)->Write("x", std::vector<uint8_t>{1}).IgnoreError(), "not declared");
  EXPECT_DEATH((*writer)->Commit().IgnoreError(), "not written");
}

}  // namespace
}  // namespace nibble
