#include "tools/quantize/settings.h"

#include <functional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace nibble {
namespace {

using Q = QuantizeSettings;

struct Setting {
  std::string name;
  std::string allowed;
  std::string meaning;
  std::function<std::string(const Q&)> print;
  std::function<bool(const std::string&, Q*)> parse;  // false: not an allowed value; settings are then undefined
};

// The values of an enumeration, by name in its order. A bool is one with two values.
template <typename T>
Setting Choice(const char* name, T Q::*member, std::vector<std::string> names, const char* meaning) {
  return {.name = name,
          .allowed = absl::StrJoin(names, ", "),
          .meaning = meaning,
          .print = [=](const Q& s) { return names[static_cast<size_t>(s.*member)]; },
          .parse =
              [=](const std::string& text, Q* s) {
                for (size_t i = 0; i < names.size(); ++i) {
                  if (text != names[i]) continue;
                  s->*member = static_cast<T>(i);
                  return true;
                }
                return false;
              }};
}

Setting Switch(const char* name, bool Q::*member, const char* meaning) {
  return Choice(name, member, {"off", "on"}, meaning);
}

template <typename T>
Setting Number(const char* name, T Q::*member, T least, T most, const char* meaning) {
  return {.name = name,
          .allowed = absl::StrCat(least, "..", most),
          .meaning = meaning,
          .print = [=](const Q& s) { return absl::StrCat(s.*member); },
          .parse =
              [=](const std::string& text, Q* s) {
                T& value = s->*member;
                if constexpr (std::is_floating_point_v<T>) {
                  return absl::SimpleAtod(text, &value) && value >= least && value <= most;
                } else {
                  return absl::SimpleAtoi(text, &value) && value >= least && value <= most;
                }
              }};
}

const std::vector<Setting>& Settings() {
  static const auto* const settings = new std::vector<Setting>{
      Choice("rotate-residual", &Q::rotate_residual, {"off", "hadamard", "principal"},
             "basis of the residual stream, folded into the weights (R1)"),
      Switch("rotate-heads", &Q::rotate_heads, "Hadamard on value heads, folded into v and o (R2)"),
      Switch("rotate-down", &Q::rotate_down, "online block-Hadamard in front of down (R4)"),
      Switch("sort-neurons", &Q::sort_neurons, "feed-forward neurons by falling contribution, folded into the weights"),
      Number("smooth-attention", &Q::smooth_attention, 0.0, 1.0, "exponent of SmoothAttention on keys, 0 = off"),
      Number("smooth-output", &Q::smooth_output, 0.0, 1.0, "exponent of smoothing in front of o and down, 0 = off"),
      Number("seed", &Q::seed, int64_t{0}, int64_t{1} << 32, "of the rotations' signs"),
      Switch("clip-search", &Q::clip_search, "search the clips of weight rows and groups"),
      Switch("gptq", &Q::gptq, "compensate rounding errors in the columns to come"),
      Choice("gptq-order", &Q::gptq_order, {"stored", "within-group", "by-group", "all"},
             "in which order GPTQ takes the columns"),
      Number("damp", &Q::damp, 1e-6, 1.0, "of GPTQ's Hessian, relative to its mean diagonal"),
      Number("refinements", &Q::refinements, int64_t{0}, int64_t{100}, "rounds of coordinate descent after rounding"),
      Switch("coded-inputs", &Q::coded_inputs, "rounding knows how inputs are coded and aims at the uncoded output"),
      Switch("quantized-flow", &Q::quantized_flow, "calibrate a layer behind the quantized ones, not the float ones"),
      Choice("permute", &Q::permute, {"off", "magnitude", "energy"},
             "order of input channels: outliers share blocks (FMPQ, activation-aware reordering)"),
      Number("eight-bit-share", &Q::eight_bit_share, 0.0, 1.0,
             "w4a4kv4: largest share of an input's blocks in 8 bits (one at least, unless 0)"),
  };
  return *settings;
}

}  // namespace

absl::StatusOr<QuantizeSettings> PresetSettings(const std::string& name) {
  const QuantizeSettings none;
  const QuantizeSettings fast{.rotate_residual = ResidualRotation::kHadamard,
                              .rotate_heads = true,
                              .rotate_down = true,
                              .smooth_attention = 0.7,
                              .permute = ChannelOrder::kEnergy,
                              .eight_bit_share = 0.17};
  QuantizeSettings balanced = fast;
  balanced.gptq = true;
  QuantizeSettings best = balanced;
  best.rotate_residual = ResidualRotation::kPrincipal;
  best.permute = ChannelOrder::kOff;
  best.smooth_output = 0.5;
  best.damp = 0.002;
  best.refinements = 2;
  best.sort_neurons = true;
  best.clip_search = true;
  if (name == "none") return none;
  if (name == "fast") return fast;
  if (name == "balanced") return balanced;
  if (name == "best") return best;
  return absl::InvalidArgumentError(absl::StrCat("preset is \"", name, "\", must be best, balanced, fast or none"));
}

absl::Status SetSetting(const std::string& assignment, QuantizeSettings* settings) {
  const size_t equals = assignment.find('=');
  const std::string name = assignment.substr(0, equals);
  for (const Setting& setting : Settings()) {
    if (name != setting.name) continue;
    const std::string value = equals == std::string::npos ? "" : assignment.substr(equals + 1);
    QuantizeSettings changed = *settings;
    if (!setting.parse(value, &changed)) {
      return absl::InvalidArgumentError(
          absl::StrCat("setting ", name, " is \"", value, "\"; it takes ", setting.allowed));
    }
    *settings = changed;
    return absl::OkStatus();
  }
  const std::string names =
      absl::StrJoin(Settings(), ", ", [](std::string* out, const Setting& setting) { out->append(setting.name); });
  return absl::InvalidArgumentError(absl::StrCat("no setting is called \"", name, "\"; there are ", names));
}

std::map<std::string, std::string> SettingValues(const QuantizeSettings& settings) {
  std::map<std::string, std::string> values;
  for (const Setting& setting : Settings()) values[setting.name] = setting.print(settings);
  return values;
}

std::string DescribeSettings(const QuantizeSettings& settings) {
  std::string text;
  for (const Setting& setting : Settings()) {
    absl::StrAppendFormat(&text, "%-18s %-10s %s (%s)\n", setting.name, setting.print(settings), setting.meaning,
                          setting.allowed);
  }
  return text;
}

}  // namespace nibble
