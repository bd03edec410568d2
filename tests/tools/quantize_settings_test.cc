#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "tools/quantize/settings.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

TEST(Settings, EveryValueIsReadAsItIsPrinted) {
  for (const char* preset : {"best", "balanced", "fast", "none"}) {
    const auto settings = PresetSettings(preset);
    ASSERT_TRUE(settings.ok()) << settings.status();
    QuantizeSettings read{.rotate_down = true, .seed = 99, .gptq = true, .eight_bit_share = 0.5};
    for (const auto& [name, value] : SettingValues(*settings)) {
      EXPECT_TRUE(SetSetting(name + "=" + value, &read).ok()) << name << "=" << value;
    }
    EXPECT_EQ(SettingValues(read), SettingValues(*settings)) << preset;
  }
}

TEST(Settings, PresetsDiffer) {
  std::map<std::map<std::string, std::string>, std::string> seen;
  for (const char* preset : {"best", "balanced", "fast", "none"}) {
    const auto [at, fresh] = seen.emplace(SettingValues(*PresetSettings(preset)), preset);
    EXPECT_TRUE(fresh) << preset << " is " << at->second;
  }
}

TEST(Settings, RefusesWhatItDoesNotKnow) {
  EXPECT_THAT(std::string(PresetSettings("better").status().message()),
              HasSubstr("preset is \"better\", must be best, balanced, fast or none"));
  QuantizeSettings settings;
  const QuantizeSettings before = settings;
  const auto refused = [&](const std::string& assignment, const std::string& message) {
    const absl::Status status = SetSetting(assignment, &settings);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << assignment;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
    EXPECT_EQ(SettingValues(settings), SettingValues(before));
  };
  refused("gtpq=on", "no setting is called \"gtpq\"; there are rotate-residual, ");
  refused("gptq", "setting gptq is \"\"; it takes off, on");
  refused("gptq=1", "it takes off, on");
  refused("rotate-residual=pca", "it takes off, hadamard, principal");
  refused("damp=0", "it takes 1e-06..1");
  refused("damp=nan", "it takes");
  refused("seed=-1", "it takes 0..4294967296");
  refused("refinements=2.5", "it takes 0..100");
  EXPECT_TRUE(SetSetting("damp=0.5", &settings).ok());
  EXPECT_EQ(settings.damp, 0.5);
}

TEST(Settings, AreListedWithTheirMeaning) {
  const std::string text = DescribeSettings(*PresetSettings("best"));
  EXPECT_THAT(text, HasSubstr("rotate-residual    principal"));
  EXPECT_THAT(text, HasSubstr("(off, hadamard, principal)"));
}

}  // namespace
}  // namespace nibble
