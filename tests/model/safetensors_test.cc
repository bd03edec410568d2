#include "common/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "common/model/json_file.h"
#include "tests/model/tiny_model.h"

namespace nibble {
namespace {

using ::nibble::testing::TempDir;
using ::testing::HasSubstr;
using Json = nlohmann::json;

std::string Length(uint64_t bytes) {
  std::string out(8, '\0');
  std::memcpy(out.data(), &bytes, 8);
  return out;
}

std::string File(const std::string& header, size_t data_bytes) {
  return Length(header.size()) + header + std::string(data_bytes, 'd');
}

void Write(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

absl::Status OpenBytes(const std::string& bytes) {
  TempDir dir;
  Write(dir / "model.safetensors", bytes);
  return SafeTensors::Open(dir.path()).status();
}

constexpr char kGood[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
    R"("b":{"dtype":"U8","shape":[],"data_offsets":[12,13]},"c":{"dtype":"F32","shape":[0,4],"data_offsets":[13,13]}})";

TEST(SafeTensors, ReadsTensorsScalarsAndEmptyOnes) {
  TempDir dir;
  Write(dir / "model.safetensors", File(std::string(kGood) + "   ", 13));
  const auto file = SafeTensors::Open(dir.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->tensors().size(), 3u);
  const int64_t shape[] = {2, 3};
  const auto a = (*file)->Get("a", TensorType::kBF16, shape);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(a->bytes, 12);
  EXPECT_EQ(a->data[0], 'd');
  EXPECT_EQ((*file)->Get("b", TensorType::kU8, {})->bytes, 1);
  EXPECT_EQ((*file)->Get("c")->bytes, 0);
  EXPECT_TRUE(absl::IsNotFound((*file)->Get("d").status()));
  EXPECT_TRUE(absl::IsInvalidArgument((*file)->Get("a", TensorType::kF16, shape).status()));
  const int64_t other[] = {3, 2};
  EXPECT_THAT(std::string((*file)->Get("a", TensorType::kBF16, other).status().message()),
              HasSubstr("BF16 [2, 3], must be BF16 [3, 2]"));
}

TEST(SafeTensors, RefusesHostileFiles) {
  const auto one = [](const std::string& fields) { return "{\"a\":{" + fields + "}}"; };
  const struct {
    const char* what;
    std::string bytes;
  } cases[] = {
      {"empty file", ""},
      {"only a length", Length(2)},
      {"header longer than the file", Length(1000) + "{}"},
      {"header length near 2^64", Length(~uint64_t{0}) + "{}"},
      {"header length 2^63", Length(uint64_t{1} << 63) + "{}"},
      {"empty header", Length(0) + std::string(8, 'x')},
      {"not an object", File("[1]", 0)},
      {"not JSON", File("{\"a\"", 0)},
      {"deep nesting", File("{\"a\":" + std::string(5000, '['), 0)},
      {"duplicate name", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                              R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                              2)},
      {"metadata not strings", File(R"({"__metadata__":{"n":1}})", 0)},
      {"no name", File(R"({"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1)},
      {"entry not an object", File(R"({"a":3})", 0)},
      {"missing field", File(one(R"("dtype":"U8","shape":[1])"), 1)},
      {"extra field", File(one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1)"), 1)},
      {"dtype not a string", File(one(R"("dtype":8,"shape":[1],"data_offsets":[0,1])"), 1)},
      {"negative dimension", File(one(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), 1)},
      {"fractional dimension", File(one(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), 1)},
      {"shape overflows", File(one(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])"), 0)},
      {"dimension over int64", File(one(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1])"), 1)},
      {"too many dimensions", File(one(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"), 1)},
      {"one offset", File(one(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), 1)},
      {"backward offsets", File(one(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), 1)},
      {"past the end", File(one(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), 1)},
      {"offset over int64",
       File(one(R"("dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615])"), 1)},
      {"size mismatch", File(one(R"("dtype":"BF16","shape":[1],"data_offsets":[0,1])"), 1)},
      {"trailing bytes", File(one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), 2)},
      {"hole",
       File(
           R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
           3)},
      {"overlap",
       File(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
           3)},
  };
  for (const auto& c : cases) {
    const absl::Status status = OpenBytes(c.bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.what << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("model.safetensors")) << c.what;
  }
  EXPECT_EQ(OpenBytes(File(one(R"("dtype":"F64","shape":[1],"data_offsets":[0,8])"), 8)).code(),
            absl::StatusCode::kUnimplemented);
}

TEST(SafeTensors, RefusesEveryTruncation) {
  const std::string whole = File(kGood, 13);
  ASSERT_TRUE(OpenBytes(whole).ok());
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    EXPECT_FALSE(OpenBytes(whole.substr(0, bytes)).ok()) << "first " << bytes << " bytes";
  }
}

// Whatever bytes a file has, opening it ends in a Status, and every tensor handed out lies inside the file.
TEST(SafeTensors, SurvivesMutations) {
  const std::string whole = File(kGood, 13);
  const std::string tokens[] = {"{",   "}",    "[",  "]",   ",", ":", "\"", "0", "-1", "9223372036854775807",
                                "1e9", "null", "\\", "\xff"};
  std::mt19937_64 random(20240611);
  TempDir dir;
  int accepted = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string bytes = whole;
    for (uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + random() % 8);
          break;
        case 2:
          bytes.insert(at, tokens[random() % std::size(tokens)]);
          break;
        default:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
      }
      if (bytes.empty()) bytes.push_back('x');
    }
    Write(dir / "model.safetensors", bytes);
    const auto file = SafeTensors::Open(dir.path());
    if (!file.ok()) continue;
    ++accepted;
    for (const auto& [name, view] : (*file)->tensors()) {
      uint8_t sum = 0;
      for (int64_t i = 0; i < view.bytes; ++i) sum = static_cast<uint8_t>(sum + view.data[i]);  // ASan watches
      ASSERT_LE(view.bytes, static_cast<int64_t>(bytes.size())) << int{sum};
    }
  }
  EXPECT_GT(accepted, 10);  // edits of data bytes and names are harmless; or else the test tests nothing
}

class ShardedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Write(dir_ / "model-1.safetensors", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
    Write(dir_ / "model-2.safetensors", File(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
  }
  absl::Status OpenWith(const Json& weight_map) {
    Write(dir_ / "model.safetensors.index.json", Json{{"weight_map", weight_map}}.dump());
    return SafeTensors::Open(dir_.path()).status();
  }
  TempDir dir_;
};

TEST_F(ShardedTest, ReadsWhatTheIndexNames) {
  EXPECT_TRUE(OpenWith({{"a", "model-1.safetensors"}, {"b", "model-2.safetensors"}}).ok());
}

TEST_F(ShardedTest, RefusesAnIndexThatDisagrees) {
  EXPECT_THAT(std::string(OpenWith({{"a", "model-2.safetensors"}, {"b", "model-2.safetensors"}}).message()),
              HasSubstr("\"a\""));
  EXPECT_THAT(std::string(OpenWith({{"a", "model-1.safetensors"}, {"c", "model-2.safetensors"}}).message()),
              HasSubstr("\"b\""));
  EXPECT_TRUE(absl::IsNotFound(OpenWith({{"a", "model-3.safetensors"}})));
  Write(dir_ / "model-2.safetensors", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
  EXPECT_TRUE(absl::IsInvalidArgument(OpenWith({{"a", "model-1.safetensors"}, {"b", "model-2.safetensors"}})));
}

TEST_F(ShardedTest, RefusesFilesElsewhere) {
  for (const Json& file : {Json("../model-1.safetensors"), Json("/etc/passwd"), Json("x/model-1.safetensors"),
                           Json(".."), Json(""), Json(7), Json(std::string("model-1.safetensors\0x", 21))}) {
    EXPECT_TRUE(absl::IsInvalidArgument(OpenWith({{"a", file}}))) << file;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(OpenWith(Json::object())));
  EXPECT_TRUE(absl::IsInvalidArgument(OpenWith("model-1.safetensors")));
}

TEST(SafeTensors, RefusesWhatIsNotAFile) {
  TempDir dir;
  EXPECT_TRUE(absl::IsNotFound(SafeTensors::Open(dir.path()).status()));
  ASSERT_EQ(::mkfifo((dir / "model.safetensors").c_str(), 0600), 0);
  EXPECT_TRUE(absl::IsInvalidArgument(SafeTensors::Open(dir.path()).status()));  // and does not hang
}

}  // namespace
}  // namespace nibble
