#include "tools/quantize/calibration.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/tokenizer.h"

namespace nibble {

std::vector<float> MeanSquare(std::span<const float> rows, int64_t k) {
  std::vector<double> sums(static_cast<size_t>(k), 0.0);
  for (size_t i = 0; i < rows.size(); ++i)
    sums[i % sums.size()] += static_cast<double>(rows[i]) * static_cast<double>(rows[i]);
  std::vector<float> mean;
  for (const double sum : sums)
    mean.push_back(
        static_cast<float>(sum * static_cast<double>(k) / static_cast<double>(std::max<size_t>(1, rows.size()))));
  return mean;
}

std::vector<float> ChannelMax(std::span<const float> rows, int64_t k) {
  std::vector<float> max(static_cast<size_t>(k), 0.0f);
  for (size_t i = 0; i < rows.size(); ++i) {
    float& m = max[i % max.size()];
    m = std::max(m, std::fabs(rows[i]));
  }
  return max;
}

absl::StatusOr<std::vector<std::vector<uint32_t>>> CalibrationWindows(const std::string& tokenizer_dir,
                                                                      const std::string& text_path, int64_t vocab_size,
                                                                      const CalibrationOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(tokenizer_dir));
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(text_path, Tokenizer::kMaxTextBytes));
  absl::StatusOr<std::vector<uint32_t>> ids =
      tokenizer->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false});
  if (!ids.ok()) return Annotate(ids.status(), text_path);
  const int64_t tokens = static_cast<int64_t>(ids->size());
  const auto unknown = std::find_if(ids->begin(), ids->end(), [&](uint32_t id) { return id >= vocab_size; });
  if (unknown != ids->end()) {
    return absl::InvalidArgumentError(absl::StrCat(tokenizer_dir, "/tokenizer.json: gives token id ", *unknown,
                                                   ", the model's vocabulary has ", vocab_size));
  }

  const auto bos = tokenizer->bos_id();
  const bool with_bos = bos.has_value() && *bos < vocab_size;
  const int64_t taken = options.window_tokens - (with_bos ? 1 : 0);
  if (tokens < options.min_windows * taken) {
    return absl::InvalidArgumentError(
        absl::StrCat(text_path, ": has ", tokens, " tokens, calibration needs at least ", options.min_windows * taken));
  }
  const int64_t windows = std::min(options.windows, tokens / taken);
  std::vector<std::vector<uint32_t>> out;
  for (int64_t i = 0; i < windows; ++i) {
    const auto begin = ids->begin() + static_cast<ptrdiff_t>((tokens / windows) * i);
    std::vector<uint32_t> window;
    if (with_bos) window.push_back(*bos);
    window.insert(window.end(), begin, begin + static_cast<ptrdiff_t>(taken));
    out.push_back(std::move(window));
  }
  return out;
}

}  // namespace nibble
