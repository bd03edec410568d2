// The report of a quantized model: what it says, and that its page stands alone.
#include "tools/quantize/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/model/tiny_model.h"
#include "tools/quantize/rounding_record.h"

namespace nibble {
namespace {

using ::nibble::testing::TempDir;
using ::nibble::testing::TinyModel;
using ::nibble::testing::WriteTinyModel;
using ::testing::HasSubstr;
using ::testing::Not;

// Two unrelated models of one shape: the report measures, it does not care how the second was made.
class ReportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyModel({.vocab_size = 4096}, dir_ / "float").ok());
    ASSERT_TRUE(
        WriteTinyModel({.vocab_size = 4096, .quantization = Quantization::kW4A4KV4, .seed = 2}, dir_ / "w4").ok());
    std::filesystem::copy_file("deploy/models/novelist-17m/tokenizer.json", dir_ / "float/tokenizer.json");
    std::ifstream in("deploy/models/text/calibration.txt");
    std::string text(4000, '\0');
    in.read(text.data(), static_cast<std::streamsize>(text.size()));
    std::ofstream(dir_ / "text") << text;
  }
  ReportOptions Options() const {
    return {.model = dir_ / "float", .quantized = dir_ / "w4", .text = dir_ / "text", .window = 64, .max_windows = 3};
  }
  TempDir dir_;
};

TEST_F(ReportTest, CountsBlocksBytesAndTokens) {
  int64_t done = 0, total = 0;
  const auto report = BuildReport(Options(), [&](int64_t d, int64_t t) { done = d, total = t; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(done, 3);
  EXPECT_EQ(total, 3);
  ASSERT_TRUE(report->divergence.has_value());
  EXPECT_EQ(report->divergence->tokens, 3 * 63);
  EXPECT_GT(report->divergence->mean_kl, 0);
  EXPECT_EQ(report->blocks(), 2 * (2 + 2 + 2 + 4));
  EXPECT_EQ(report->eight_bit_blocks(), 2 * 4);  // one of each input
  EXPECT_EQ(report->kv_bytes_per_token, 2 * 2 * 2 * (64 / 2 + 4));
  EXPECT_EQ(report->float_kv_bytes_per_token, 2 * 2 * 2 * 64 * 2);
  ASSERT_EQ(report->sizes.size(), 3u);
  EXPECT_GT(report->sizes[0].float_bytes, 3 * report->sizes[0].quantized_bytes);
  EXPECT_EQ(report->sizes[1].float_bytes, 2 * 4096 * 256 * 2);
  EXPECT_EQ(report->sizes[1].quantized_bytes, report->sizes[1].float_bytes);
  ASSERT_EQ(report->layers.size(), 2u);
  for (const InputReport& input : report->layers[1].inputs) {
    EXPECT_EQ(input.before.size(), kPictureBins) << input.name;
    EXPECT_EQ(input.after.size(), kPictureBins);
    EXPECT_GT(input.before_peak, 1);
    EXPECT_GT(input.after_peak, 1);
  }
}

TEST_F(ReportTest, PutsRecordedErrorsWhereTheyBelong) {
  std::ofstream(dir_ / std::string("w4/") + kRoundingRecordFile)
      << FormatRoundingRecord({{"model.layers.1.mlp.down_proj", 0.08, 0.0425, "Hessian is singular"}});
  ReportOptions options = Options();
  options.text.clear();
  const auto report = BuildReport(options, {});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->divergence.has_value());
  EXPECT_FALSE(report->layers[0].linears[6].output_error.has_value());
  EXPECT_EQ(report->layers[1].linears[6].output_error, 0.0425);
  const std::string text = FormatReport(*report);
  EXPECT_THAT(text, HasSubstr("4.25"));
  EXPECT_THAT(text, HasSubstr("rounded to nearest: Hessian is singular"));
  EXPECT_EQ(ReportJson(*report)["layers"][1]["linears"][6]["weight_error"], 0.08);
  EXPECT_THAT(ReportHtml(*report), HasSubstr("Hessian is singular"));
}

TEST_F(ReportTest, ThePageStandsAlone) {
  const auto report = BuildReport(Options(), {});
  ASSERT_TRUE(report.ok()) << report.status();
  const std::string html = ReportHtml(*report);
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, HasSubstr("prefers-color-scheme:dark"));
  for (const char* outside : {"http:", "https:", "<script", "<link", "url(", "src="}) EXPECT_THAT(html, Not(HasSubstr(outside)));
  QuantizationReport odd = *report;
  odd.quantized = "<b>&\"";
  EXPECT_THAT(ReportHtml(odd), Not(HasSubstr("<b>&\"")));
}

TEST_F(ReportTest, RefusesPairsThatAreNone) {
  const auto refused = [&](ReportOptions options, const std::string& message) {
    const auto report = BuildReport(options, {});
    EXPECT_EQ(report.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(report.status().message()), HasSubstr(message));
  };
  ReportOptions options = Options();
  std::swap(options.model, options.quantized);
  refused(options, "is quantized, must be the float model");
  options = Options();
  options.quantized = options.model;
  refused(options, "is not quantized");
  ASSERT_TRUE(WriteTinyModel({.num_layers = 3, .vocab_size = 4096, .quantization = Quantization::kW4A8KV4}, dir_ / "deep").ok());
  options.quantized = dir_ / "deep";
  refused(options, "num_hidden_layers is 3, the float model's is 2");
  options = Options();
  options.window = 4000;
  refused(options, "fewer than one window of 4000");
  std::ofstream(dir_ / std::string("w4/") + kRoundingRecordFile) << "{\"linears\": [{\"name\": 3}]}";
  refused(Options(), kRoundingRecordFile);
}

TEST(WeightError, IsRelative) {
  const std::vector<float> w = {3, 4}, rounded = {3, 3.5f};
  EXPECT_NEAR(WeightError(w, rounded), 0.1, 1e-12);
  EXPECT_EQ(WeightError(std::vector<float>{0, 0}, std::vector<float>{0, 0}), 0);
}

}  // namespace
}  // namespace nibble
