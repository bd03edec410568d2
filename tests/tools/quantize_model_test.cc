// nibble-quantize from directory to directory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "common/model/json_file.h"
#include "kernels/ops.h"
#include "tests/model/tiny_model.h"
#include "tools/quantize/quantizer.h"
#include "worker/model/engine.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using ::nibble::testing::TempDir;
using ::nibble::testing::TinyModel;
using ::nibble::testing::WriteTinyModel;
using ::testing::HasSubstr;

constexpr char kBundled[] = "deploy/models/novelist-17m";
constexpr char kText[] = "deploy/models/text/calibration.txt";

std::string Contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

size_t Entries(const std::string& dir) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(dir), fs::directory_iterator()));
}

// A tiny model with the bundled tokenizer and a page of text.
class QuantizeModelTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteSource({.vocab_size = 4096, .attention_bias = true}); }
  void WriteSource(const TinyModel& tiny) {
    fs::remove_all(dir_ / "source");
    const absl::Status written = WriteTinyModel(tiny, dir_ / "source");
    ASSERT_TRUE(written.ok()) << written;
    fs::copy_file(std::string(kBundled) + "/tokenizer.json", dir_ / "source/tokenizer.json");
    std::ofstream(dir_ / "text") << Contents(kText).substr(0, 20000);
  }
  QuantizeOptions Options(Quantization mode) const {
    QuantizeOptions options;
    options.model = dir_ / "source";
    options.output = dir_ / "out";
    options.mode = mode;
    options.calibration = dir_ / "text";
    options.settings = *PresetSettings("fast");
    options.calibration_options = {
        .windows = 6, .min_windows = 4, .window_tokens = 48, .sample_rows = 64, .threads = 2};
    return options;
  }
  absl::StatusOr<QuantizeReport> Quantize(const QuantizeOptions& options) {
    QuantizeListener listener;
    return QuantizeModel(options, &listener);
  }
  // Refused, with the message, and nothing new beside the source.
  void ExpectRefused(const QuantizeOptions& options, absl::StatusCode code, const std::string& message) {
    const size_t before = Entries(dir_.path());
    const auto report = Quantize(options);
    EXPECT_EQ(report.status().code(), code) << report.status();
    EXPECT_THAT(std::string(report.status().message()), HasSubstr(message));
    EXPECT_EQ(Entries(dir_.path()), before);
  }
  static void ExpectLoads(const std::string& dir, std::initializer_list<int> worlds) {
    const auto checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    for (const int world : worlds) {
      for (int rank = 0; rank < world; ++rank) {
        auto ops = CreateOps({.backend = "cpu", .threads = 1});
        ASSERT_TRUE(ops.ok()) << ops.status();
        const auto model = LoadModel(**checkpoint, *std::move(ops), rank, world);
        EXPECT_TRUE(model.ok()) << "rank " << rank << " of " << world << ": " << model.status();
      }
    }
  }
  TempDir dir_;
};

TEST_F(QuantizeModelTest, EveryModeMakesACheckpointThatLoadsAtEverySize) {
  for (const Quantization mode : {Quantization::kW4A4KV4, Quantization::kW4A8KV4, Quantization::kBF16}) {
    QuantizeOptions options = Options(mode);
    options.output = dir_ / QuantizationName(mode);
    const auto report = Quantize(options);
    ASSERT_TRUE(report.ok()) << report.status();
    ExpectLoads(options.output, {1, 2});
    const auto config = LoadModelConfig(options.output);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->quantization, mode);
    EXPECT_EQ(Contents(options.output + "/tokenizer.json"), Contents(dir_ / "source/tokenizer.json"));
    if (mode == Quantization::kW4A4KV4) {
      // 2 layers of 2 + 2 + 2 + 4 blocks; qkv and gate/up have one in 8 bits at least, and that is the 17 %.
      EXPECT_EQ(report->blocks, 20);
      EXPECT_EQ(report->eight_bit_blocks, 4);
      EXPECT_THAT(report->eight_bit_per_input, ::testing::ElementsAre(1, 0, 1, 0, 1, 0, 1, 0));
    } else if (mode == Quantization::kW4A8KV4) {
      EXPECT_EQ(report->eight_bit_blocks, report->blocks);
    }
    EXPECT_EQ(report->output_bytes < report->source_bytes, mode != Quantization::kBF16);
  }
}

TEST_F(QuantizeModelTest, TiedHeadsAndLargeSharesWork) {
  WriteSource({.vocab_size = 4096, .tie_word_embeddings = true});
  QuantizeOptions options = Options(Quantization::kW4A4KV4);
  options.settings.eight_bit_share = 0.4;
  const auto report = Quantize(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LE(report->eight_bit_blocks, 8);
  EXPECT_GT(report->eight_bit_blocks, 4);
  ExpectLoads(options.output, {1, 2});
}

TEST_F(QuantizeModelTest, UnquantizedModeCopiesEveryValue) {
  ASSERT_TRUE(Quantize(Options(Quantization::kBF16)).ok());
  const auto source = Checkpoint::Open(dir_ / "source"), copy = Checkpoint::Open(dir_ / "out");
  ASSERT_TRUE(source.ok() && copy.ok());
  ASSERT_EQ((*source)->tensors().tensors().size(), (*copy)->tensors().tensors().size());
  for (const LinearShape& shape : DecoderLinears((*source)->config())) {
    const auto a = (*source)->Linear(shape.name, ShardAxis::kNone, 0, 1),
               b = (*copy)->Linear(shape.name, ShardAxis::kNone, 0, 1);
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_EQ(std::memcmp(a->dense.data(), b->dense.data(), a->dense.size() * sizeof(BF16)), 0) << shape.name;
    EXPECT_EQ(a->bias, b->bias) << shape.name;
  }
}

TEST_F(QuantizeModelTest, SameBytesWithAnyNumberOfThreads) {
  QuantizeOptions options = Options(Quantization::kW4A4KV4);
  ASSERT_TRUE(Quantize(options).ok());
  options.output = dir_ / "again";
  options.calibration_options.threads = 1;
  ASSERT_TRUE(Quantize(options).ok());
  EXPECT_EQ(Contents(dir_ / "out/model.safetensors"), Contents(dir_ / "again/model.safetensors"));
  EXPECT_EQ(Contents(dir_ / "out/config.json"), Contents(dir_ / "again/config.json"));
}

TEST_F(QuantizeModelTest, ReplacesAnOutputOnlyWhenAsked) {
  QuantizeOptions options = Options(Quantization::kBF16);
  ASSERT_TRUE(Quantize(options).ok());
  options.mode = Quantization::kW4A8KV4;
  ExpectRefused(options, absl::StatusCode::kAlreadyExists, "exists");
  EXPECT_EQ(LoadModelConfig(options.output)->quantization, Quantization::kBF16);
  options.overwrite = true;
  ASSERT_TRUE(Quantize(options).ok());
  EXPECT_EQ(LoadModelConfig(options.output)->quantization, Quantization::kW4A8KV4);
  EXPECT_EQ(Entries(dir_.path()), 3u);  // source, text, out

  options.output = options.model + "/../source/";
  ExpectRefused(options, absl::StatusCode::kInvalidArgument, "is the model itself");
}

TEST_F(QuantizeModelTest, RefusesSourcesItCannotUse) {
  QuantizeOptions options = Options(Quantization::kW4A4KV4);
  options.model = dir_ / "nothing";
  ExpectRefused(options, absl::StatusCode::kNotFound, "nothing/config.json");

  ASSERT_TRUE(Quantize(Options(Quantization::kW4A8KV4)).ok());
  fs::rename(dir_ / "out", dir_ / "quantized");
  options.model = dir_ / "quantized";
  ExpectRefused(options, absl::StatusCode::kInvalidArgument, "is quantized already (w4a8kv4)");

  WriteSource({.intermediate_size = 320, .vocab_size = 4096});
  ExpectRefused(Options(Quantization::kW4A4KV4), absl::StatusCode::kInvalidArgument,
                "down_proj has 320 input channels");

  WriteSource({.vocab_size = 300});
  ExpectRefused(Options(Quantization::kW4A4KV4), absl::StatusCode::kInvalidArgument, "the model's vocabulary has 300");

  WriteSource({.vocab_size = 4096});
  fs::resize_file(dir_ / "source/model.safetensors", fs::file_size(dir_ / "source/model.safetensors") - 1);
  ExpectRefused(Options(Quantization::kW4A4KV4), absl::StatusCode::kInvalidArgument, "model.safetensors");
}

TEST_F(QuantizeModelTest, RefusesTextItCannotUse) {
  const QuantizeOptions options = Options(Quantization::kW4A4KV4);
  std::ofstream(dir_ / "text") << "A short story.";
  ExpectRefused(options, absl::StatusCode::kInvalidArgument, "calibration needs at least 188");
  std::ofstream(dir_ / "text") << "";
  ExpectRefused(options, absl::StatusCode::kInvalidArgument, "has 0 tokens");
  std::ofstream(dir_ / "text") << std::string(5000, '\xff');
  ExpectRefused(options, absl::StatusCode::kInvalidArgument, "text");
  fs::remove(dir_ / "text");
  ExpectRefused(options, absl::StatusCode::kNotFound, "text");
}

TEST_F(QuantizeModelTest, StopsWhenToldAndLeavesNothing) {
  struct Impatient : QuantizeListener {
    absl::Status Quantized(int64_t done, int64_t, const std::string&) override {
      return done < 9 ? absl::OkStatus() : absl::CancelledError("enough");
    }
  } listener;
  EXPECT_TRUE(absl::IsCancelled(QuantizeModel(Options(Quantization::kW4A4KV4), &listener).status()));
  EXPECT_EQ(Entries(dir_.path()), 2u);
}

// A file size limit acts like a full disk.
TEST_F(QuantizeModelTest, ReportsAFullDisk) {
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 100 << 10;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  ExpectRefused(Options(Quantization::kW4A4KV4), absl::StatusCode::kResourceExhausted, "out/model.safetensors");
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, old_handler);
}

TEST_F(QuantizeModelTest, TheBundledModelLoadsAtOneAndTwo) {
  for (const Quantization mode : {Quantization::kW4A4KV4, Quantization::kW4A8KV4}) {
    QuantizeOptions options = Options(mode);
    options.model = kBundled;
    options.output = dir_ / QuantizationName(mode);
    options.calibration = kText;
    const auto report = Quantize(options);
    ASSERT_TRUE(report.ok()) << report.status();
    ExpectLoads(options.output, {1, 2});
    if (mode == Quantization::kW4A4KV4) {
      EXPECT_LE(static_cast<double>(report->eight_bit_blocks), 0.17 * static_cast<double>(report->blocks));
    }
    const auto too_many =
        (*Checkpoint::Open(options.output))->Linear("model.layers.0.self_attn.k_proj", ShardAxis::kColumns, 0, 4);
    EXPECT_TRUE(absl::IsInvalidArgument(too_many.status()));
  }
}

// The command line itself.
class CommandTest : public QuantizeModelTest {
 protected:
  // Exit status; stdout and stderr in output_.
  int Run(const std::string& arguments) {
    const char* bin = std::getenv("NIBBLE_BIN_DIR");
    NIBBLE_CHECK(bin != nullptr, "NIBBLE_BIN_DIR is set by ctest");
    const std::string log = dir_ / "log";
    const int status = std::system((std::string(bin) + "/nibble-quantize " + arguments + " >" + log + " 2>&1").c_str());
    output_ = Contents(log);
    fs::remove(log);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  std::string Paths() const { return "--model " + (dir_ / "source") + " --output " + (dir_ / "out"); }
  std::string output_;
};

TEST_F(CommandTest, SaysWhatItWants) {
  EXPECT_EQ(Run("--help"), 0);
  EXPECT_THAT(output_, HasSubstr("w4a4kv4"));
  EXPECT_THAT(output_, HasSubstr("--calibration"));
  EXPECT_NE(Run(Paths() + " --mode w2a2 --calibration " + (dir_ / "text")), 0);
  EXPECT_THAT(output_, HasSubstr("w2a2"));
  EXPECT_NE(Run(Paths() + " --mode w4a4kv4"), 0);
  EXPECT_THAT(output_, HasSubstr("--calibration is required"));
  EXPECT_EQ(Run(Paths() + " --mode w4a4kv4 --calibration " + (dir_ / "missing")), 1);
  EXPECT_THAT(output_, HasSubstr("missing"));
  EXPECT_EQ(Entries(dir_.path()), 2u);
}

TEST_F(CommandTest, Quantizes) {
  EXPECT_EQ(Run(Paths() + " --window-tokens 64 --windows 4 --threads 2 --calibration " + (dir_ / "text")), 0)
      << output_;
  EXPECT_THAT(output_, HasSubstr("4 of 20 blocks in 8 bits"));
  EXPECT_NE(Run(Paths() + " --mode bf16"), 0);
  EXPECT_THAT(output_, HasSubstr("exists"));
  EXPECT_EQ(Run(Paths() + " --mode bf16 --force"), 0) << output_;
  ExpectLoads(dir_ / "out", {1, 2});
}

// A write that hits a limit is an error with a name, not a signal, and leaves no part of a model.
TEST_F(CommandTest, SurvivesAFullDisk) {
  const char* bin = std::getenv("NIBBLE_BIN_DIR");
  ASSERT_NE(bin, nullptr);
  const std::string command =
      "ulimit -f 100; exec " + std::string(bin) + "/nibble-quantize " + Paths() + " --mode bf16 2>/dev/null";
  const int status = std::system(command.c_str());
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_EQ(Entries(dir_.path()), 2u);
}

}  // namespace
}  // namespace nibble
