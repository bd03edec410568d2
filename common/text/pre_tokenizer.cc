#include "common/text/pre_tokenizer.h"

#include <fmt/format.h>

#include <utility>

#include "common/base/status.h"

namespace nibble {

absl::StatusOr<PreTokenizer> PreTokenizer::Create(std::vector<SplitStage> stages) {
  PreTokenizer result;
  for (SplitStage& stage : stages) {
    std::optional<Regex> regex;
    if (!stage.pattern.empty()) {
      absl::StatusOr<Regex> compiled = Regex::Compile(stage.pattern);
      if (!compiled.ok())
        return Annotate(compiled.status(), fmt::format("pre_tokenizer stage {}", result.stages_.size()));
      regex = *std::move(compiled);
    }
    result.regexes_.push_back(std::move(regex));
    result.stages_.push_back(std::move(stage));
  }
  return result;
}

PreTokenizer::Scratch::Scratch(const PreTokenizer& pre_tokenizer, size_t text_bytes)
    : prefixed_(pre_tokenizer.stages_.size()) {
  const RegexScan::CpuTime deadline = RegexScan::Deadline(text_bytes);
  scans_.reserve(pre_tokenizer.regexes_.size());
  for (const std::optional<Regex>& regex : pre_tokenizer.regexes_) {
    scans_.emplace_back();
    if (regex) scans_.back().emplace(*regex, deadline);
  }
}

absl::Status PreTokenizer::Split(std::string_view segment, Scratch* scratch,
                                 absl::FunctionRef<void(std::string_view)> word) const {
  if (segment.empty()) return absl::OkStatus();
  return RunStage(0, segment, scratch, word);
}

absl::Status PreTokenizer::RunStage(size_t index, std::string_view piece, Scratch* scratch,
                                    absl::FunctionRef<void(std::string_view)> word) const {
  if (index == stages_.size()) {
    word(piece);
    return absl::OkStatus();
  }
  const SplitStage& stage = stages_[index];
  if (stage.prefix_space && piece.front() != ' ') {
    std::string& prefixed = scratch->prefixed_[index];
    prefixed.assign(1, ' ').append(piece);
    piece = prefixed;
  }
  std::optional<RegexScan>& scan = scratch->scans_[index];
  if (!scan) return RunStage(index + 1, piece, scratch, word);

  scan->Start(piece);
  size_t begin = 0, end = 0, done = 0;
  while (scan->Next(&begin, &end)) {
    if (stage.keep_gaps && begin > done)
      NIBBLE_RETURN_IF_ERROR(RunStage(index + 1, piece.substr(done, begin - done), scratch, word));
    if (stage.keep_matches)
      NIBBLE_RETURN_IF_ERROR(RunStage(index + 1, piece.substr(begin, end - begin), scratch, word));
    done = end;
  }
  NIBBLE_RETURN_IF_ERROR(scan->status());
  if (stage.keep_gaps && done < piece.size()) return RunStage(index + 1, piece.substr(done), scratch, word);
  return absl::OkStatus();
}

}  // namespace nibble
