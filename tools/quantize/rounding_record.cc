#include "tools/quantize/rounding_record.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

constexpr int64_t kMaxRecordBytes = int64_t{16} << 20;

}  // namespace

double WeightError(std::span<const float> weight, std::span<const float> rounded) {
  NIBBLE_CHECK_EQ(rounded.size(), weight.size());
  double error = 0, energy = 0;
  for (size_t i = 0; i < rounded.size(); ++i) {
    const double w = static_cast<double>(weight[i]), d = w - static_cast<double>(rounded[i]);
    error += d * d;
    energy += w * w;
  }
  return energy > 0 ? std::sqrt(error / energy) : 0;
}

std::string FormatRoundingRecord(const std::vector<LinearCost>& linears) {
  nlohmann::json json = {{"linears", nlohmann::json::array()}};
  for (const LinearCost& cost : linears) {
    nlohmann::json entry = {
        {"name", cost.name}, {"weight_error", cost.weight_error}, {"output_error", cost.output_error}};
    if (!cost.fallback.empty()) entry["fallback"] = cost.fallback;
    json["linears"].push_back(std::move(entry));
  }
  return json.dump(1) + "\n";
}

absl::StatusOr<std::vector<LinearCost>> LoadRoundingRecord(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/", kRoundingRecordFile);
  NIBBLE_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJsonObject(path, kMaxRecordBytes));
  std::vector<LinearCost> linears;
  try {
    for (const nlohmann::json& entry : json.at("linears")) {
      linears.push_back({.name = entry.at("name").get<std::string>(),
                         .weight_error = entry.at("weight_error").get<double>(),
                         .output_error = entry.at("output_error").get<double>(),
                         .fallback = entry.value("fallback", "")});
    }
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": linear ", linears.size(), ": ", e.what()));
  }
  return linears;
}

}  // namespace nibble
