// Sequences come and go; pages and slots follow them.
#include "router/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "router/scheduler_state.h"

namespace nibble {

void StepInFlight::Clear() {
  step = 0;
  prefill_samples.clear();
  decode_samples.clear();
  prompt_scores.clear();
  num_logprobs = num_prompt_scores = 0;
}

SequenceEvent& AddEvent(const Sequence& sequence, TimePoint now, std::vector<SequenceEvent>* events) {
  SequenceEvent& event = events->emplace_back();
  event.sequence_id = sequence.id;
  event.at = now;
  event.cached_tokens = sequence.cached_tokens;
  event.preemptions = sequence.preemptions;
  event.first_scheduled_at = sequence.first_scheduled_at;
  return event;
}

Scheduler::State::State(const SchedulerConfig& c)
    : config(c), tables(c.num_pages, c.page_tokens, c.prefix_cache), flights(c.max_steps_in_flight) {
  NIBBLE_CHECK_GT(config.max_sequences, 0u);
  NIBBLE_CHECK_GT(config.max_step_tokens, 0u);
  NIBBLE_CHECK_GT(config.max_prefill_chunk, 0u);
  NIBBLE_CHECK_GT(config.max_steps_in_flight, 0u);
  running.reserve(config.max_sequences);
  Clear();
}

void Scheduler::State::Clear() {
  ended.clear();
  entries.clear();
  running.clear();
  waiting.clear();
  deadlines.clear();
  unchecked.clear();
  waiting_tokens = 0;
  tables = PageTables(config.num_pages, config.page_tokens, config.prefix_cache);
  free_slots.clear();
  for (uint32_t slot = config.max_sequences; slot > 0; --slot) free_slots.push_back(slot - 1);
  released_slots.clear();
  step = 0;
  for (StepInFlight& flight : flights) flight.Clear();
  oldest_flight = num_flights = 0;
}

void Scheduler::State::Enqueue(Entry* entry) {
  entry->phase = Entry::Phase::kWaiting;
  entry->retry_when_available = 0;
  entry->retry_at_step = 0;
  entry->behind_id = 0;
  waiting.insert(entry);
  waiting_tokens += entry->known();
}

void Scheduler::State::Dequeue(Entry* entry) {
  waiting.erase(entry);
  waiting_tokens -= entry->known();
}

void Scheduler::State::Vacate(Entry* entry) {
  // Rows still in flight write to these pages before anybody who gets them now does: plans are executed in order.
  tables.Release(&entry->table);
  running.erase(std::find(running.begin(), running.end(), entry));
  free_slots.push_back(entry->slot);
  released_slots.push_back(entry->slot);
  entry->computed = entry->prefill_end = 0;
}

void Scheduler::State::Preempt(Entry* entry) {
  uint64_t generated = 0, max_tokens = 0;
  for (const Entry* e : running) {
    generated += OutputReserve::Clip(e->sequence->num_output_tokens());
    max_tokens += OutputReserve::Clip(e->sequence->max_tokens);
  }
  reserve.OnPreemption(generated, running.size(), max_tokens);
  Vacate(entry);
  Enqueue(entry);
  ++entry->sequence->preemptions;
  ++counters.preemptions;
}

std::unique_ptr<Sequence> Scheduler::State::End(Entry* entry) {
  if (entry->phase == Entry::Phase::kRunning) {
    Vacate(entry);
  } else {
    Dequeue(entry);
  }
  entry->phase = Entry::Phase::kEnded;
  std::unique_ptr<Sequence> sequence = std::move(entry->sequence);
  if (sequence->deadline != TimePoint::max()) deadlines.erase({sequence->deadline, sequence->id});
  const auto owned = entries.find(sequence->id);
  if (entry->results_in_flight > 0) ended.push_back(std::move(owned->second));
  entries.erase(owned);
  return sequence;
}

void Scheduler::State::EndWithError(Entry* entry, absl::Status status, TimePoint now,
                                    std::vector<SequenceEvent>* events) {
  AddEvent(*End(entry), now, events).status = std::move(status);
}

void Scheduler::State::EndExpired(TimePoint now, std::vector<SequenceEvent>* events) {
  while (!deadlines.empty() && deadlines.begin()->first <= now) {
    Entry* entry = entries.find(deadlines.begin()->second)->second.get();
    EndWithError(entry,
                 absl::DeadlineExceededError(absl::StrCat("deadline passed when ", entry->sequence->num_output_tokens(),
                                                          " of at most ", entry->sequence->max_tokens,
                                                          " output tokens were generated")),
                 now, events);
  }
}

void Scheduler::State::EndImpossible(TimePoint now, std::vector<SequenceEvent>* events) {
  if (config.num_pages == 0) return;
  for (const uint64_t id : unchecked) {
    const auto it = entries.find(id);
    if (it == entries.end()) continue;
    Sequence& sequence = *it->second->sequence;
    // The last output token is never fed back, so it needs no place.
    const uint64_t room = uint64_t{tables.num_pages()} * config.page_tokens + 1;
    const uint64_t least =
        sequence.num_prompt_tokens + std::max({1u, sequence.min_tokens, sequence.num_output_tokens() + 1});
    if (sequence.max_tokens_open && least <= room) {
      sequence.max_tokens =
          static_cast<uint32_t>(std::min<uint64_t>(sequence.max_tokens, room - sequence.num_prompt_tokens));
    }
    const uint32_t pages = tables.PagesFor(uint64_t{sequence.num_prompt_tokens} + sequence.max_tokens - 1);
    if (pages <= tables.num_pages()) continue;
    EndWithError(
        it->second.get(),
        absl::ResourceExhaustedError(absl::StrCat(
            "request needs ", pages, " KV pages (", sequence.num_prompt_tokens, " prompt tokens + max_tokens ",
            sequence.max_tokens, ", ", config.page_tokens, " tokens per page), a replica has ", tables.num_pages())),
        now, events);
  }
  unchecked.clear();
}

Scheduler::Scheduler(const SchedulerConfig& config) : state_(std::make_unique<State>(config)) {}
Scheduler::~Scheduler() = default;

void Scheduler::SetCapacity(uint32_t num_pages) {
  State& s = *state_;
  NIBBLE_CHECK(s.running.empty() && s.num_flights == 0, "capacity changes only between incarnations");
  s.config.num_pages = num_pages;
  s.tables = PageTables(num_pages, s.config.page_tokens, s.config.prefix_cache);
  s.unchecked.clear();
  for (const auto& [id, entry] : s.entries) s.unchecked.push_back(id);
  std::sort(s.unchecked.begin(), s.unchecked.end());
}

void Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  State& s = *state_;
  NIBBLE_CHECK_GT(sequence->num_prompt_tokens, 0u);
  NIBBLE_CHECK_GE(sequence->token_ids.size(), sequence->num_prompt_tokens);
  NIBBLE_CHECK_LT(sequence->num_output_tokens(), sequence->max_tokens);
  const uint64_t id = sequence->id;
  auto owned = std::make_unique<Entry>();
  Entry* entry = owned.get();
  NIBBLE_CHECK(s.entries.try_emplace(id, std::move(owned)).second, "sequence " + std::to_string(id) + " added twice");
  entry->wants_logprobs = sequence->sampling.logprobs();
  if (sequence->deadline != TimePoint::max()) s.deadlines.insert({sequence->deadline, id});
  entry->sequence = std::move(sequence);
  s.unchecked.push_back(id);
  s.Enqueue(entry);
}

void Scheduler::Cancel(uint64_t sequence_id) {
  const auto it = state_->entries.find(sequence_id);
  if (it != state_->entries.end()) state_->End(it->second.get());
}

uint32_t Scheduler::steps_in_flight() const { return state_->num_flights; }

bool Scheduler::idle() const { return state_->entries.empty() && state_->num_flights == 0; }

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = state_->counters;
  stats.running = static_cast<uint32_t>(state_->running.size());
  stats.waiting = static_cast<uint32_t>(state_->waiting.size());
  stats.waiting_prompt_tokens = state_->waiting_tokens;
  stats.free_pages = state_->tables.num_available();
  stats.cached_pages = state_->tables.num_cached();
  stats.total_pages = state_->tables.num_pages();
  return stats;
}

uint32_t Scheduler::CachedPrefixTokens(const std::vector<uint32_t>& token_ids, const std::string& cache_salt) const {
  if (token_ids.empty()) return 0;
  const uint32_t page_tokens = state_->config.page_tokens;
  const uint32_t max_pages = static_cast<uint32_t>((token_ids.size() - 1) / page_tokens);
  return state_->tables.Match(cache_salt, token_ids, max_pages).num_pages * page_tokens;
}

std::vector<std::unique_ptr<Sequence>> Scheduler::TakeAll() {
  State& s = *state_;
  std::vector<std::unique_ptr<Sequence>> sequences;
  sequences.reserve(s.entries.size());
  for (auto& [id, entry] : s.entries) {
    if (entry->phase == Entry::Phase::kRunning) ++entry->sequence->preemptions;
    sequences.push_back(std::move(entry->sequence));
  }
  std::sort(sequences.begin(), sequences.end(),
            [](const auto& a, const auto& b) { return std::pair(a->arrival, a->id) < std::pair(b->arrival, b->id); });
  s.Clear();
  return sequences;
}

}  // namespace nibble
