// Commit: what the replica computed becomes tokens and events.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "router/scheduler_state.h"

namespace nibble {
namespace {

// Between two steps hundreds of sequences fall out of the caches, and each then costs three misses one after another.
// Asked for in three rounds, the misses of a round overlap.
void Prefetch(const std::vector<StepInFlight::Sample>& samples) {
  for (const auto& sample : samples) __builtin_prefetch(sample.entry);
  for (const auto& sample : samples) __builtin_prefetch(sample.entry->sequence.get());
  for (const auto& sample : samples) {
    const Sequence* sequence = sample.entry->sequence.get();
    if (sequence == nullptr) continue;
    __builtin_prefetch(&sequence->id);
    __builtin_prefetch(sequence->token_ids.data() + sequence->token_ids.size(), 1);
  }
}

}  // namespace

absl::Status Scheduler::Commit(const v1::StepResult& result, TimePoint now, std::vector<SequenceEvent>* events) {
  State& s = *state_;
  if (s.num_flights == 0) {
    return absl::InternalError(absl::StrCat("result of step ", result.step(), " came when no step was in flight"));
  }
  StepInFlight& flight = s.flights[s.oldest_flight];
  if (absl::Status status = s.CheckResult(flight, result); !status.ok()) return status;

  int first_score = 0;
  for (const StepInFlight::PromptScores& scores : flight.prompt_scores) {
    s.CommitPromptScores(scores, first_score, result, now, events);
    first_score += static_cast<int>(scores.count);
  }
  int row = 0, logprobs_row = 0;
  for (const auto* samples : {&flight.prefill_samples, &flight.decode_samples}) {
    Prefetch(*samples);
    for (const StepInFlight::Sample& sample : *samples) {
      const v1::RowLogprobs* logprobs = sample.entry->wants_logprobs ? &result.logprobs(logprobs_row++) : nullptr;
      s.CommitSample(sample.entry, result.token_ids(row++), logprobs, now, events);
    }
  }

  s.oldest_flight = (s.oldest_flight + 1) % s.config.max_steps_in_flight;
  --s.num_flights;
  if (!s.ended.empty()) {
    std::erase_if(s.ended, [](const std::unique_ptr<Entry>& entry) { return entry->results_in_flight == 0; });
  }
  return absl::OkStatus();
}

// Everything is checked before anything is applied.
absl::Status Scheduler::State::CheckResult(const StepInFlight& flight, const v1::StepResult& result) const {
  if (result.step() != flight.step) {
    return absl::InternalError(absl::StrCat("result is of step ", result.step(), ", expected step ", flight.step));
  }
  const size_t samples = flight.prefill_samples.size() + flight.decode_samples.size();
  const auto count_is = [&](const char* field, size_t value, size_t expected) {
    return value == expected ? absl::OkStatus()
                             : absl::InternalError(absl::StrCat("result of step ", flight.step, " has ", value, " ",
                                                                field, ", expected ", expected));
  };
  if (auto status = count_is("token_ids", result.token_ids_size(), samples); !status.ok()) return status;
  if (auto status = count_is("logprobs", result.logprobs_size(), flight.num_logprobs); !status.ok()) return status;
  if (auto status = count_is("prompt_logprobs", result.prompt_logprobs_size(), flight.num_prompt_scores);
      !status.ok()) {
    return status;
  }
  const auto slot_is = [&](const char* field, int index, uint32_t value, uint32_t expected) {
    return value == expected ? absl::OkStatus()
                             : absl::InternalError(absl::StrCat("result of step ", flight.step, " has ", field, "[",
                                                                index, "].slot ", value, ", expected ", expected));
  };
  if (flight.num_logprobs > 0) {
    int i = 0;
    for (const auto* rows : {&flight.prefill_samples, &flight.decode_samples}) {
      for (const StepInFlight::Sample& sample : *rows) {
        if (!sample.entry->wants_logprobs) continue;
        if (auto status = slot_is("logprobs", i, result.logprobs(i).slot(), sample.slot); !status.ok()) return status;
        ++i;
      }
    }
  }
  int i = 0;
  for (const StepInFlight::PromptScores& scores : flight.prompt_scores) {
    for (uint32_t k = 0; k < scores.count; ++k, ++i) {
      if (auto status = slot_is("prompt_logprobs", i, result.prompt_logprobs(i).slot(), scores.slot); !status.ok()) {
        return status;
      }
    }
  }
  return absl::OkStatus();
}

void Scheduler::State::CommitPromptScores(const StepInFlight::PromptScores& scores, int first,
                                          const v1::StepResult& result, TimePoint now,
                                          std::vector<SequenceEvent>* events) {
  Entry* entry = scores.entry;
  --entry->results_in_flight;
  if (entry->phase == Entry::Phase::kEnded) return;
  // After a preemption or a replay the same positions are scored again.
  Sequence& sequence = *entry->sequence;
  const uint32_t begin = std::max(scores.first_position, sequence.prompt_logprobs_sent + 1);
  const uint32_t end = scores.first_position + scores.count;
  if (begin >= end) return;
  auto sent = std::make_unique<SequenceScores>();
  for (uint32_t position = begin; position < end; ++position) {
    sent->prompt_logprobs.push_back(result.prompt_logprobs(first + static_cast<int>(position - scores.first_position)));
  }
  sequence.prompt_logprobs_sent = end - 1;
  AddEvent(sequence, now, events).scores = std::move(sent);
}

void Scheduler::State::CommitSample(Entry* entry, uint32_t token_id, const v1::RowLogprobs* logprobs, TimePoint now,
                                    std::vector<SequenceEvent>* events) {
  --entry->results_in_flight;
  --entry->samples_in_flight;
  if (entry->phase == Entry::Phase::kEnded) return;  // computed beyond a stop, or for a client that left

  Sequence& sequence = *entry->sequence;
  const bool may_stop = sequence.num_output_tokens() >= sequence.min_tokens;
  sequence.token_ids.push_back(token_id);
  if (entry->phase == Entry::Phase::kWaiting) ++waiting_tokens;  // preempted after this step was sent
  ++counters.generation_tokens;

  SequenceEvent& event = AddEvent(sequence, now, events);
  event.token_id = token_id;
  if (logprobs != nullptr) {
    event.scores = std::make_unique<SequenceScores>();
    event.scores->logprobs = *logprobs;
  }
  if (may_stop && std::binary_search(sequence.stop_ids.begin(), sequence.stop_ids.end(), token_id)) {
    event.finish = v1::FINISH_REASON_STOP;
  } else if (sequence.num_output_tokens() == sequence.max_tokens) {
    event.finish = v1::FINISH_REASON_LENGTH;
  }
  if (entry->phase == Entry::Phase::kRunning) {
    tables.Register(&entry->table, sequence.token_ids, entry->computed);
  }
  if (event.finish.has_value()) End(entry);
}

}  // namespace nibble
