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
#include "tools/eval/engine_group.h"
#include "tools/eval/scorer.h"
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
    options.settings = *PresetSettings("best");
    options.calibration_options = {.windows = 6, .min_windows = 4, .window_tokens = 48, .sample_rows = 64};
    options.threads = 2;
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
  // Log-probabilities that a model of the source's vocabulary gives to the tokens of a fixed sequence.
  static std::vector<double> Logprobs(const std::string& dir) {
    std::vector<std::vector<uint32_t>> sequence(1);
    for (uint32_t i = 0; i < 64; ++i) sequence[0].push_back(i * i * 37 % 4096);
    const auto checkpoint = Checkpoint::Open(dir);
    NIBBLE_CHECK(checkpoint.ok(), checkpoint.status().ToString());
    const auto group = EngineGroup::Create(
        **checkpoint,
        {.world_size = 1, .threads_per_rank = 1, .limits = ScoringLimits((*checkpoint)->config(), 1, 64)});
    NIBBLE_CHECK(group.ok(), group.status().ToString());
    const auto scores = Score(**group, sequence, 0);
    NIBBLE_CHECK(scores.ok(), scores.status().ToString());
    std::vector<double> out;
    for (const TokenScore& score : scores->at(0)) out.push_back(score.logprob);
    return out;
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
      // 2 layers of 2 + 2 + 2 + 4 blocks; 17 % of so few is none, but every input has one.
      EXPECT_EQ(report->blocks, 20);
      EXPECT_EQ(report->eight_bit_blocks, 8);
      EXPECT_THAT(report->eight_bit_per_input, ::testing::Each(1));
    } else if (mode == Quantization::kW4A8KV4) {
      EXPECT_EQ(report->eight_bit_blocks, report->blocks);
    }
    EXPECT_EQ(report->output_bytes < report->source_bytes, mode != Quantization::kBF16);
  }
}

TEST_F(QuantizeModelTest, TiedHeadsAndLargeSharesWork) {
  WriteSource({.vocab_size = 4096, .tie_word_embeddings = true});
  QuantizeOptions options = Options(Quantization::kW4A4KV4);
  options.settings.eight_bit_share = 0.5;
  const auto report = Quantize(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(report->eight_bit_per_input, ::testing::ElementsAre(1, 1, 1, 2, 1, 1, 1, 2));
  EXPECT_FALSE(LoadModelConfig(options.output)->tie_word_embeddings);  // embedding and head are rotated apart
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
  options.threads = 1;
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

// Stops before step `stop` of a run.
struct Impatient : QuantizeListener {
  explicit Impatient(int64_t at) : stop(at) {}
  absl::Status Advanced(int64_t done, int64_t steps, const std::string&) override {
    total = steps;
    return done < stop ? absl::OkStatus() : absl::CancelledError("enough");
  }
  const int64_t stop;
  int64_t total = 0;
};

TEST_F(QuantizeModelTest, StopsWhenToldAndLeavesNothingOfAnUnfinishedLayer) {
  Impatient listener(3);
  EXPECT_TRUE(absl::IsCancelled(QuantizeModel(Options(Quantization::kW4A4KV4), &listener).status()));
  EXPECT_EQ(Entries(dir_.path()), 2u);
}

TEST_F(QuantizeModelTest, AKilledRunContinuesToTheSameBytes) {
  QuantizeOptions options = Options(Quantization::kW4A4KV4);
  options.settings.quantized_flow = true;
  options.output = dir_ / "whole";
  Impatient patient(1 << 20);
  ASSERT_TRUE(QuantizeModel(options, &patient).ok());

  // Killed in the second of two layers: nobody cleans up.
  struct Killer : Impatient {
    using Impatient::Impatient;
    absl::Status Advanced(int64_t done, int64_t, const std::string&) override {
      if (done == stop) std::raise(SIGKILL);
      return absl::OkStatus();
    }
  };
  options.output = dir_ / "out";
  EXPECT_EXIT(
      {
        Killer killer(patient.total - 2);
        QuantizeModel(options, &killer).IgnoreError();
      },
      ::testing::KilledBySignal(SIGKILL), "");
  ExpectRefused(options, absl::StatusCode::kFailedPrecondition, "out.work holds an interrupted run");
  options.resume = true;
  options.settings.seed = 2;
  ExpectRefused(options, absl::StatusCode::kFailedPrecondition, "is of another run: settings was");
  options.settings.seed = 1;

  // Continued, and interrupted again.
  Impatient impatient(3);
  const absl::Status stopped = QuantizeModel(options, &impatient).status();
  EXPECT_TRUE(absl::IsCancelled(stopped));
  EXPECT_THAT(std::string(stopped.message()), HasSubstr("1 of 2 layers are kept in " + (dir_ / "out.work")));
  EXPECT_FALSE(fs::exists(dir_ / "out"));

  // What a kill at the worst moment leaves: a layer whose hidden states did not make it.
  fs::copy(dir_ / "out.work/layer-0", dir_ / "out.work/layer-1");
  Impatient rest(1 << 20);
  const auto report = QuantizeModel(options, &rest);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LT(rest.total, patient.total);
  EXPECT_EQ(report->blocks, 20);
  for (const char* file : {"model.safetensors", "config.json", "rounding_record.json"})
    EXPECT_EQ(Contents((dir_ / "whole/") + file), Contents((dir_ / "out/") + file)) << file;
  EXPECT_FALSE(fs::exists(dir_ / "out.work"));
}

// Every transform off and on, against the float model: what is left of the error is the coding's.
TEST_F(QuantizeModelTest, EveryPresetCodesTheSameFunction) {
  const std::vector<double> wanted = Logprobs(dir_ / "source");
  for (const char* preset : {"none", "fast", "balanced", "best"}) {
    QuantizeOptions options = Options(Quantization::kW4A8KV4);
    options.settings = *PresetSettings(preset);
    options.output = dir_ / preset;
    ASSERT_TRUE(Quantize(options).ok());
    const std::vector<double> coded = Logprobs(options.output);
    ASSERT_EQ(coded.size(), wanted.size());
    double error = 0, spread = 0, mean = 0;
    for (const double x : wanted) mean += x / static_cast<double>(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      error += (coded[i] - wanted[i]) * (coded[i] - wanted[i]);
      spread += (wanted[i] - mean) * (wanted[i] - mean);
    }
    EXPECT_LT(error, 0.25 * spread) << preset << ": " << error / spread;
  }
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
      // One of four blocks of the narrow inputs, the fewest there can be.
      EXPECT_LE(static_cast<double>(report->eight_bit_blocks), 0.25 * static_cast<double>(report->blocks));
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
  EXPECT_THAT(output_, HasSubstr("8 of 20 blocks in 8 bits"));
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
