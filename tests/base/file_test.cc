#include "common/base/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace nibble {
namespace {

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "nibble_file_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  size_t NumFiles() const {
    return static_cast<size_t>(
        std::distance(std::filesystem::directory_iterator(dir_), std::filesystem::directory_iterator()));
  }
  std::string dir_;
};

TEST_F(FileTest, WritesReplacesAndReads) {
  const std::string path = dir_ + "/port";
  ASSERT_TRUE(WriteFileAtomically(path, "50061\n").ok());
  EXPECT_EQ(*ReadSmallFile(path), "50061\n");
  const std::string large(100000, 'x');
  ASSERT_TRUE(WriteFileAtomically(path, large).ok());
  EXPECT_EQ(*ReadSmallFile(path), large);
  EXPECT_EQ(NumFiles(), 1u);
}

TEST_F(FileTest, AFailedWriteLeavesNothing) {
  const std::string taken = dir_ + "/taken";
  ASSERT_EQ(mkdir(taken.c_str(), 0755), 0);
  const absl::Status status = WriteFileAtomically(taken, "x");  // rename onto a directory
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find(taken), std::string::npos) << status;
  EXPECT_EQ(NumFiles(), 1u);
  EXPECT_EQ(WriteFileAtomically(dir_ + "/none/port", "x").code(), absl::StatusCode::kNotFound);
}

TEST_F(FileTest, ReadNamesPathAndReason) {
  EXPECT_EQ(ReadSmallFile(dir_ + "/none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadSmallFile(dir_).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(WriteFileAtomically(dir_ + "/big", std::string(11, 'x')).ok());
  EXPECT_TRUE(ReadSmallFile(dir_ + "/big", 11).ok());
  const absl::Status status = ReadSmallFile(dir_ + "/big", 10).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("larger than 10 bytes"), std::string::npos) << status;
}

TEST_F(FileTest, APipeDoesNotHang) {
  const std::string pipe = dir_ + "/pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(ReadSmallFile(pipe).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nibble
