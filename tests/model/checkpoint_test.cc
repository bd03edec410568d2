#include "common/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/model/tiny_model.h"

namespace nibble {
namespace {

using ::nibble::testing::TempDir;
using ::nibble::testing::TinyConfig;
using ::nibble::testing::TinyModel;
using ::nibble::testing::WriteTinyModel;
using ::testing::Each;
using ::testing::HasSubstr;

std::unique_ptr<Checkpoint> MustOpen(const TinyModel& tiny, const std::string& dir) {
  const absl::Status written = WriteTinyModel(tiny, dir);
  NIBBLE_CHECK(written.ok(), written.ToString());
  auto checkpoint = Checkpoint::Open(dir);
  NIBBLE_CHECK(checkpoint.ok(), checkpoint.status().ToString());
  return *std::move(checkpoint);
}

LinearTensors MustLoad(const Checkpoint& checkpoint, const std::string& name, ShardAxis axis, int rank, int world) {
  auto linear = checkpoint.Linear(name, axis, rank, world);
  NIBBLE_CHECK(linear.ok(), linear.status().ToString());
  return *std::move(linear);
}

// The real weight a linear applies to input channel c of its own input: what sharding must preserve.
std::vector<float> Dequantize(const LinearTensors& l) {
  std::vector<float> weight(static_cast<size_t>(l.n * l.k));
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t i = 0; i < l.k; ++i) {
      const int64_t channel = l.input_perm.empty() ? i : l.input_perm[static_cast<size_t>(i)];
      float value;
      if (l.quantized) {
        const uint8_t byte = l.qweight[static_cast<size_t>((n * l.k + i) / 2)];
        const int q4 = i % 2 == 0 ? byte & 15 : byte >> 4;
        const size_t group = static_cast<size_t>(n * (l.k / 128) + i / 128);
        value = l.channel_scale[static_cast<size_t>(n)] *
                static_cast<float>(q4 * l.group_scale[group] + l.group_min[group]);
      } else {
        value = ToFloat(l.dense[static_cast<size_t>(n * l.k + i)]);
      }
      weight[static_cast<size_t>(n * l.k + channel)] = value;
    }
  }
  return weight;
}

TEST(Checkpoint, OpensTheBundledModel) {
  const auto checkpoint = Checkpoint::Open("deploy/models/novelist-17m");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const LinearTensors head = MustLoad(**checkpoint, "lm_head", ShardAxis::kColumns, 1, 2);
  EXPECT_EQ(head.n, 2048);
  EXPECT_EQ((*checkpoint)->Fingerprint().size(), 16u);
}

// Every linear, both storage kinds: the shards put together are the whole.
TEST(Checkpoint, ShardsTileTheWhole) {
  for (const Quantization q : {Quantization::kBF16, Quantization::kW4A8KV4, Quantization::kW4A4KV4}) {
    TempDir dir;
    const TinyModel tiny{
        .intermediate_size = 1024, .num_heads = 8, .num_kv_heads = 4, .attention_bias = true, .quantization = q};
    const auto checkpoint = MustOpen(tiny, dir / "m");
    for (const LinearShape& shape : DecoderLinears(checkpoint->config())) {
      const LinearTensors whole = MustLoad(*checkpoint, shape.name, shape.axis, 0, 1);
      const std::vector<float> want = Dequantize(whole);
      for (const int world : {2, 4}) {
        for (int rank = 0; rank < world; ++rank) {
          const LinearTensors part = MustLoad(*checkpoint, shape.name, shape.axis, rank, world);
          const bool rows = shape.axis == ShardAxis::kRows;
          ASSERT_EQ(part.n, rows ? shape.n : shape.n / world);
          ASSERT_EQ(part.k, rows ? shape.k / world : shape.k);
          const int64_t row0 = rows ? 0 : part.n * rank, column0 = rows ? part.k * rank : 0;
          const std::vector<float> got = Dequantize(part);
          for (int64_t n = 0; n < part.n; ++n) {
            for (int64_t c = 0; c < part.k; ++c) {
              ASSERT_EQ(got[static_cast<size_t>(n * part.k + c)],
                        want[static_cast<size_t>((row0 + n) * shape.k + column0 + c)])
                  << shape.name << " rank " << rank << " of " << world << " row " << n << " channel " << c;
            }
          }
          if (shape.bias && rows) {
            EXPECT_EQ(part.bias.size(), rank == 0 ? static_cast<size_t>(shape.n) : 0u);
          } else if (shape.bias) {
            ASSERT_EQ(part.bias.size(), static_cast<size_t>(part.n));
            EXPECT_EQ(part.bias.front(), whole.bias[static_cast<size_t>(row0)]);
          } else {
            EXPECT_TRUE(part.bias.empty());
          }
          EXPECT_EQ(part.block_bits.size(), q == Quantization::kBF16 ? 0u : static_cast<size_t>(part.k / 128));
        }
      }
    }
  }
}

TEST(Checkpoint, HeadIsPaddedEquallyOnEveryRank) {
  for (const bool tied : {false, true}) {
    TempDir dir;
    const auto checkpoint =
        MustOpen({.num_heads = 8, .num_kv_heads = 4, .vocab_size = 321, .tie_word_embeddings = tied}, dir / "m");
    const LinearTensors whole = MustLoad(*checkpoint, "lm_head", ShardAxis::kColumns, 0, 1);
    ASSERT_EQ(whole.n, 321);
    std::vector<uint16_t> bits;
    for (int rank = 0; rank < 4; ++rank) {
      const LinearTensors part = MustLoad(*checkpoint, "lm_head", ShardAxis::kColumns, rank, 4);
      ASSERT_EQ(part.n, 81);
      for (const BF16 x : part.dense) bits.push_back(x.bits);
    }
    for (size_t i = 0; i < whole.dense.size(); ++i) ASSERT_EQ(bits[i], whole.dense[i].bits);
    bits.erase(bits.begin(), bits.begin() + static_cast<ptrdiff_t>(whole.dense.size()));
    EXPECT_EQ(bits.size(), 3u * 256u);
    EXPECT_THAT(bits, Each(0));
    const int64_t shape[] = {321, 256};
    const auto embedding = checkpoint->Dense("model.embed_tokens.weight", shape);
    ASSERT_TRUE(embedding.ok()) << embedding.status();
    EXPECT_EQ((*embedding)[5].bits == whole.dense[5].bits, tied);
  }
}

TEST(Checkpoint, RefusesSizesThatDoNotDivide) {
  TempDir dir;
  const auto checkpoint = MustOpen({.intermediate_size = 384, .quantization = Quantization::kW4A4KV4}, dir / "m");
  const std::string layer = "model.layers.1.";
  EXPECT_TRUE(
      absl::IsInvalidArgument(checkpoint->Linear(layer + "self_attn.k_proj", ShardAxis::kColumns, 0, 4).status()));
  const absl::Status cut = checkpoint->Linear(layer + "mlp.down_proj", ShardAxis::kRows, 0, 2).status();
  EXPECT_THAT(std::string(cut.message()), HasSubstr("192 of 384 input channels, must be a multiple of 128"));
  EXPECT_TRUE(absl::IsInvalidArgument(checkpoint->Linear(layer + "mlp.down_proj", ShardAxis::kRows, 2, 2).status()));
  EXPECT_TRUE(absl::IsNotFound(checkpoint->Linear("model.layers.2.mlp.down_proj", ShardAxis::kRows, 0, 1).status()));
}

TEST(Checkpoint, SegmentsServeEverySizeThatLoads) {
  EXPECT_EQ(RowSegments(TinyConfig({})), 2);
  EXPECT_EQ(RowSegments(TinyConfig({.intermediate_size = 384})), 1);  // halves would not be whole blocks
  EXPECT_EQ(RowSegments(TinyConfig({.intermediate_size = 28672, .num_heads = 64, .num_kv_heads = 8, .head_dim = 128})),
            8);
  EXPECT_EQ(
      RowSegments(TinyConfig({.intermediate_size = 128 * 60, .num_heads = 12, .num_kv_heads = 12, .head_dim = 128})),
      12);
}

TEST(Checkpoint, FingerprintIgnoresPlaceAndFiles) {
  TempDir dir;
  const TinyModel tiny{.quantization = Quantization::kW4A4KV4};
  TinyModel sharded = tiny, reseeded = tiny;
  sharded.max_shard_bytes = 20000;
  reseeded.seed = 2;
  const auto a = MustOpen(tiny, dir / "a"), b = MustOpen(sharded, dir / "b"), c = MustOpen(reseeded, dir / "c");
  EXPECT_TRUE(std::filesystem::exists(dir / "b/model.safetensors.index.json"));
  EXPECT_EQ(a->Fingerprint(), b->Fingerprint());
  EXPECT_NE(a->Fingerprint(), c->Fingerprint());
}

TEST(Checkpoint, ConvertsOtherDenseTypes) {
  TempDir dir;
  const ModelConfig config = TinyConfig({.num_layers = 1});
  std::vector<TensorSpec> specs;
  for (const auto& [name, shape] : DenseTensors(config)) specs.push_back({name, TensorType::kF16, shape});
  std::vector<LinearShape> linears = DecoderLinears(config);
  linears.push_back(HeadLinear(config));
  for (const LinearShape& l : linears) specs.push_back({l.name + ".weight", TensorType::kF32, {l.n, l.k}});
  auto writer = ModelWriter::Create(dir / "m", specs, {});
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (const TensorSpec& spec : specs) {
    int64_t count = 1;
    for (const int64_t s : spec.shape) count *= s;
    if (spec.type == TensorType::kF16) {
      ASSERT_TRUE((*writer)->Write(spec.name, std::vector<F16>(static_cast<size_t>(count), ToF16(1.5f))).ok());
    } else {
      std::vector<float> values(static_cast<size_t>(count), 0.25f);
      if (spec.name == "lm_head.weight") values[7] = std::numeric_limits<float>::infinity();
      ASSERT_TRUE((*writer)->Write(spec.name, values).ok());
    }
  }
  ASSERT_TRUE(
      (*writer)->WriteFile("config.json", TinyConfigJson(nibble::testing::TinyModel{.num_layers = 1}).dump()).ok());
  ASSERT_TRUE((*writer)->Commit().ok());
  const auto checkpoint = Checkpoint::Open(dir / "m");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const int64_t shape[] = {256};
  EXPECT_EQ(ToFloat((*(*checkpoint)->Dense("model.norm.weight", shape))[3]), 1.5f);
  EXPECT_EQ(ToFloat(MustLoad(**checkpoint, "model.layers.0.mlp.up_proj", ShardAxis::kNone, 0, 1).dense[9]), 0.25f);
  EXPECT_THAT(std::string((*checkpoint)->Linear("lm_head", ShardAxis::kColumns, 0, 1).status().message()),
              HasSubstr("not finite"));
}

// Breaks one byte or tensor of a quantized model on disk, then expects the message.
class DamagedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status written = WriteTinyModel({.quantization = Quantization::kW4A4KV4}, dir_ / "m");
    ASSERT_TRUE(written.ok()) << written;
  }
  void Overwrite(const std::string& tensor, int64_t offset, const std::string& bytes) {
    const std::string path = dir_ / "m/model.safetensors";
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    uint64_t header_bytes = 0;
    file.read(reinterpret_cast<char*>(&header_bytes), 8);
    std::string header(header_bytes, '\0');
    file.read(header.data(), static_cast<std::streamsize>(header_bytes));
    const int64_t begin = nlohmann::json::parse(header).at(tensor).at("data_offsets").at(0).get<int64_t>();
    file.seekp(static_cast<std::streamoff>(8 + static_cast<int64_t>(header_bytes) + begin + offset));
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  std::string OpenError() { return std::string(Checkpoint::Open(dir_ / "m").status().message()); }
  std::string LoadError(const std::string& name, ShardAxis axis) {
    const auto checkpoint = Checkpoint::Open(dir_ / "m");
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return std::string((*checkpoint)->Linear(name, axis, 0, 2).status().message());
  }
  TempDir dir_;
  const std::string q_ = "model.layers.0.self_attn.q_proj", down_ = "model.layers.1.mlp.down_proj";
};

TEST_F(DamagedTest, BlockBits) {
  Overwrite(q_ + ".block_bits", 1, "\x05");
  EXPECT_THAT(OpenError(), HasSubstr("has 5 at block 1, must be 4 or 8"));
}

TEST_F(DamagedTest, ChannelScale) {
  Overwrite(q_ + ".channel_scale", 0, std::string("\x00\x00\xc0\x7f", 4));  // NaN
  EXPECT_THAT(OpenError(), HasSubstr("must be finite"));
}

TEST_F(DamagedTest, Permutation) {
  Overwrite(down_ + ".input_perm", 0, std::string("\xff\xff\xff\x7f", 4));
  EXPECT_THAT(OpenError(), HasSubstr("not a permutation"));
}

TEST_F(DamagedTest, CodingsThatDisagree) {
  Overwrite("model.layers.0.self_attn.v_proj.block_bits", 0, std::string("\x04\x04", 2));
  Overwrite("model.layers.0.self_attn.k_proj.block_bits", 0, std::string("\x04\x04", 2));
  EXPECT_THAT(OpenError(), HasSubstr("both read the same input"));
}

TEST_F(DamagedTest, GroupsThatWouldOverflow) {
  Overwrite(down_ + ".group_scale", 0, "\x10");
  Overwrite(down_ + ".group_min", 0, "\x70");
  EXPECT_THAT(LoadError(down_, ShardAxis::kRows), HasSubstr("at row 0, group 0"));
}

TEST_F(DamagedTest, PermutationAcrossRanks) {
  std::string reversed;
  for (int32_t c = 511; c >= 0; --c) reversed.append(reinterpret_cast<const char*>(&c), 4);
  Overwrite(down_ + ".input_perm", 0, reversed);
  EXPECT_THAT(LoadError(down_, ShardAxis::kRows), HasSubstr("not quantized for that size"));
}

TEST(Checkpoint, RefusesTensorsOfAnotherModel) {
  const auto reconfigured = [](const TinyModel& written, const TinyModel& claimed) {
    TempDir dir;
    const absl::Status status = WriteTinyModel(written, dir / "m");
    EXPECT_TRUE(status.ok()) << status;
    std::ofstream(dir / "m/config.json") << TinyConfigJson(claimed).dump();
    return std::string(Checkpoint::Open(dir / "m").status().message());
  };
  EXPECT_THAT(reconfigured({}, {.num_layers = 3}), HasSubstr("no tensor \"model.layers.2."));
  EXPECT_THAT(reconfigured({}, {.num_layers = 1}), HasSubstr("not part of the model"));
  EXPECT_THAT(reconfigured({}, {.vocab_size = 321}), HasSubstr("must be BF16 [321, 256]"));
  EXPECT_THAT(reconfigured({.attention_bias = true}, {}), HasSubstr("bias\" is not part of the model"));
  EXPECT_THAT(reconfigured({}, {.quantization = Quantization::kW4A8KV4}), HasSubstr("no tensor"));
  EXPECT_THAT(reconfigured({.quantization = Quantization::kW4A4KV4}, {.quantization = Quantization::kW4A8KV4}),
              HasSubstr("must be 8"));
}

}  // namespace
}  // namespace nibble
