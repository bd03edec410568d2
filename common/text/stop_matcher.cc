#include "common/text/stop_matcher.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "common/text/utf8.h"

namespace nibble {

absl::Status ValidateStopStrings(std::span<const std::string> stops) {
  if (stops.size() > kMaxStopStrings)
    return absl::InvalidArgumentError(
        fmt::format("stop has {} strings, must be at most {}", stops.size(), kMaxStopStrings));
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty() || stops[i].size() > kMaxStopBytes)
      return absl::InvalidArgumentError(
          fmt::format("stop[{}] has {} bytes, must be 1..{}", i, stops[i].size(), kMaxStopBytes));
    if (const size_t valid = ValidUtf8Prefix(stops[i]); valid != stops[i].size())
      return absl::InvalidArgumentError(fmt::format("stop[{}] is not valid UTF-8 at byte {}", i, valid));
  }
  return absl::OkStatus();
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include) : include_(include) {
  automata_.reserve(stops.size());
  for (std::string& stop : stops) {
    Automaton automaton;
    automaton.fallback.assign(stop.size() + 1, 0);
    for (size_t i = 1; i < stop.size(); ++i) {
      uint32_t border = automaton.fallback[i];
      while (border > 0 && stop[border] != stop[i]) border = automaton.fallback[border];
      automaton.fallback[i + 1] = stop[border] == stop[i] ? border + 1 : 0;
    }
    automaton.stop = std::move(stop);
    automata_.push_back(std::move(automaton));
  }
}

StopMatcher::Step StopMatcher::Append(std::string_view text) {
  Step step;
  if (done_) return step;
  if (automata_.empty()) {
    step.text = text;
    return step;
  }

  for (size_t i = 0; i < text.size(); ++i) {
    for (size_t index = 0; index < automata_.size(); ++index) {
      Automaton& automaton = automata_[index];
      uint32_t& matched = automaton.matched_bytes;
      while (matched > 0 && automaton.stop[matched] != text[i]) matched = automaton.fallback[matched];
      if (!automaton.stop.empty() && automaton.stop[matched] == text[i]) ++matched;
      const bool complete = matched == automaton.stop.size() && matched > 0;
      if (complete && (!step.matched || matched > automata_[*step.matched].stop.size())) step.matched = index;
    }
    if (step.matched) {
      done_ = true;
      step.text = std::move(held_);
      step.text.append(text.substr(0, i + 1));
      if (!include_) step.text.resize(step.text.size() - automata_[*step.matched].stop.size());
      held_.clear();
      return step;
    }
  }

  uint32_t keep = 0;
  if (!include_)
    for (const Automaton& automaton : automata_) keep = std::max(keep, automaton.matched_bytes);
  if (keep <= text.size()) {  // everything held before is certain now
    step.text = std::move(held_);
    step.text.append(text.substr(0, text.size() - keep));
    held_ = text.substr(text.size() - keep);
  } else {
    held_.append(text);
    step.text = held_.substr(0, held_.size() - keep);
    held_.erase(0, held_.size() - keep);
  }
  return step;
}

std::string StopMatcher::Flush() {
  done_ = true;
  return std::exchange(held_, {});
}

}  // namespace nibble
