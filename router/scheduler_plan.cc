// Schedule: one pass over who runs, in rank order, then over who waits.
//
// Rows that decode come first (each is one token somebody is waiting for), then chunks of prompts already begun, then
// new ones. Victims of a preemption are taken from the back of the rank order, and a sequence is visited before its
// victims, so nobody who already has a row in this plan is ever preempted by it.
#include <algorithm>

#include "absl/types/span.h"
#include "common/base/check.h"
#include "router/scheduler_state.h"

namespace nibble {
namespace {

constexpr uint32_t kMaxWaitingExamined = 64;  // per step, past sequences that wait for a prefix
constexpr uint64_t kRetrySteps = 16;          // a sequence that did not fit is looked at again after so many steps

}  // namespace

std::optional<v1::StepPlan> Scheduler::Schedule(TimePoint now, std::vector<SequenceEvent>* events) {
  State& s = *state_;
  s.EndExpired(now, events);
  s.EndImpossible(now, events);
  if (s.num_flights == s.config.max_steps_in_flight || s.config.num_pages == 0) return std::nullopt;
  if (s.running.empty() && s.waiting.empty()) return std::nullopt;

  State::PlanInProgress p{
      .flight = &s.flights[(s.oldest_flight + s.num_flights) % s.config.max_steps_in_flight],
      .budget = s.config.max_step_tokens,
      .now = now,
  };
  p.flight->Clear();
  s.ScheduleDecodes(&p);
  s.SchedulePrefills(&p);
  if (!p.preempted) s.AdmitWaiting(&p);
  if (p.budget == s.config.max_step_tokens) return std::nullopt;  // no rows

  p.plan.mutable_release_slots()->Add(s.released_slots.begin(), s.released_slots.end());
  s.released_slots.clear();
  p.plan.set_step(++s.step);
  p.flight->step = s.step;
  ++s.num_flights;
  ++s.counters.steps;
  s.reserve.OnStep();
  return std::move(p.plan);
}

void Scheduler::State::ScheduleDecodes(PlanInProgress* p) {
  p->plan.mutable_decode_slots()->Reserve(static_cast<int>(running.size()));
  for (size_t i = 0; i < running.size() && p->budget > 0; ++i) {  // running may shrink from its end
    Entry* entry = running[i];
    if (entry->prefilling() || entry->outputs_planned() >= entry->sequence->max_tokens) continue;
    if (entry->computed == entry->table.pages.size() * config.page_tokens) {
      if (!GrowByPreempting(entry, p)) continue;
      p->plan.add_page_slots(entry->slot);
      p->plan.add_page_ids(entry->table.pages.back());
    }
    p->plan.add_decode_slots(entry->slot);
    p->flight->decode_samples.push_back({entry, entry->slot});
    p->flight->num_logprobs += entry->wants_logprobs;
    ++entry->computed;
    ++entry->samples_in_flight;
    ++entry->results_in_flight;
    --p->budget;
    tables.Register(&entry->table, entry->sequence->token_ids, entry->computed);
  }
}

bool Scheduler::State::GrowByPreempting(Entry* entry, PlanInProgress* p) {
  while (!tables.Grow(&entry->table, 1)) {
    Entry* victim = running.back();
    Preempt(victim);
    p->preempted = true;
    if (victim == entry) return false;
  }
  return true;
}

void Scheduler::State::SchedulePrefills(PlanInProgress* p) {
  for (size_t i = 0; i < running.size() && p->budget > 0; ++i) {
    if (running[i]->prefilling()) ScheduleChunk(running[i], p);
  }
}

void Scheduler::State::ScheduleChunk(Entry* entry, PlanInProgress* p) {
  const Sequence& sequence = *entry->sequence;
  const uint32_t begin = entry->computed;
  const uint32_t end = begin + std::min({entry->prefill_end - begin, config.max_prefill_chunk, p->budget});
  const bool sample = end == entry->prefill_end;

  v1::PrefillChunk* chunk = p->plan.add_prefill();
  chunk->set_slot(entry->slot);
  chunk->set_num_tokens(end - begin);
  chunk->set_sample(sample);
  if (sample) {
    p->flight->prefill_samples.push_back({entry, entry->slot});
    p->flight->num_logprobs += entry->wants_logprobs;
    ++entry->samples_in_flight;
    ++entry->results_in_flight;
  }
  // The row of position i scores the prompt token at i + 1.
  const uint32_t scored_end = std::min(end, sequence.num_prompt_tokens - 1);
  if (sequence.sampling.prompt_logprobs() && begin < scored_end) {
    p->flight->prompt_scores.push_back({entry, entry->slot, begin + 1, scored_end - begin});
    p->flight->num_prompt_scores += scored_end - begin;
    ++entry->results_in_flight;
  }
  entry->computed = end;
  p->budget -= end - begin;
  tables.Register(&entry->table, sequence.token_ids, entry->computed);
}

uint64_t Scheduler::State::RemainingOutputs() const {
  uint64_t remaining = 0;
  for (const Entry* entry : running) {
    remaining += OutputReserve::Clip(entry->sequence->max_tokens - entry->outputs_planned());
  }
  return remaining;
}

// Strictly in rank order, so that nobody starves: the first that does not fit ends the round. Only sequences whose
// prefix is being computed right now are passed over; they fit better a few steps later.
void Scheduler::State::AdmitWaiting(PlanInProgress* p) {
  if (waiting.empty() || p->budget == 0 || free_slots.empty()) return;
  uint64_t remaining = RemainingOutputs();
  uint32_t examined = 0;
  for (auto it = waiting.begin(); it != waiting.end() && p->budget > 0 && !free_slots.empty();) {
    Entry* entry = *it++;
    if (++examined > kMaxWaitingExamined) return;
    if (entry->results_in_flight > 0) return;  // preempted: what it generated last is still to come
    if (StillBehind(*entry)) continue;
    if (tables.num_available() < entry->retry_when_available && step < entry->retry_at_step) return;

    const Sequence& sequence = *entry->sequence;
    PrefixMatch match;
    if (sequence.use_prefix_cache) {
      // The last known token is always computed: its row samples the next one.
      match = tables.Match(sequence.cache_salt, sequence.token_ids, (entry->known() - 1) / config.page_tokens);
      if (WaitsForPrefix(entry, match)) continue;
    }
    const uint32_t own_remaining = OutputReserve::Clip(sequence.max_tokens - sequence.num_output_tokens());
    // Alone it may use everything, so that whatever can fit is served.
    const uint64_t reserved = running.empty() ? 0 : reserve.Tokens(remaining + own_remaining);
    const uint64_t needed = uint64_t{tables.PagesFor(entry->known())} - match.num_pages + match.num_unreferenced +
                            tables.PagesFor(reserved);
    if (needed > tables.num_available()) {
      entry->retry_when_available = static_cast<uint32_t>(std::min<uint64_t>(needed, tables.num_pages()));
      entry->retry_at_step = step + kRetrySteps;
      return;
    }
    Start(entry, match, p);
    remaining += own_remaining;
    it = waiting.upper_bound(entry);  // it left the set, which moved what iterators point at
  }
}

void Scheduler::State::Start(Entry* entry, const PrefixMatch& match, PlanInProgress* p) {
  Sequence& sequence = *entry->sequence;
  Dequeue(entry);
  entry->phase = Entry::Phase::kRunning;
  entry->slot = free_slots.back();
  free_slots.pop_back();
  tables.Open(&entry->table, sequence.cache_salt, match);
  NIBBLE_CHECK(tables.Grow(&entry->table, tables.PagesFor(entry->known()) - match.num_pages));
  entry->computed = match.num_pages * config.page_tokens;
  entry->prefill_end = entry->known();
  running.insert(std::lower_bound(running.begin(), running.end(), entry, RanksBefore()), entry);

  const bool first_time = sequence.preemptions == 0;
  if (first_time) {
    sequence.first_scheduled_at = p->now;
    sequence.cached_tokens = std::min(entry->computed, sequence.num_prompt_tokens);
    counters.prompt_tokens += sequence.num_prompt_tokens;
    if (sequence.use_prefix_cache) {
      counters.prefix_queries_tokens += sequence.num_prompt_tokens;
      counters.prefix_hits_tokens += sequence.cached_tokens;
    }
  }

  v1::StartSequence* start = p->plan.add_start();
  start->set_slot(entry->slot);
  start->mutable_token_ids()->Add(sequence.token_ids.begin(), sequence.token_ids.end());
  start->set_num_prompt_tokens(sequence.num_prompt_tokens);
  start->set_num_cached_tokens(entry->computed);
  start->mutable_page_ids()->Add(entry->table.pages.begin(), entry->table.pages.end());
  *start->mutable_sampling() = sequence.sampling;
  ScheduleChunk(entry, p);
}

// A burst of requests with one prompt (n > 1, a shared system prompt) should compute it once: whoever would compute
// the very page that a running prefill computes next waits until that prefill is past what they share. In-batch prefix
// sharing as in SGLang's schedule_policy.py, by exact position instead of by a threshold.
bool Scheduler::State::WaitsForPrefix(Entry* entry, const PrefixMatch& match) {
  const absl::Span<const uint32_t> tokens = entry->sequence->token_ids;
  for (const Entry* other : running) {
    if (!other->prefilling()) continue;
    const absl::Span<const uint32_t> others = other->sequence->token_ids;
    // Up to the token before the last, which is computed in any case.
    if (!tables.Continues(other->table, others, match, tokens.first(tokens.size() - 1))) continue;
    const size_t limit = std::min(tokens.size() - 1, others.size());
    const size_t shared = std::mismatch(tokens.begin(), tokens.begin() + limit, others.begin()).first - tokens.begin();
    entry->behind_id = other->sequence->id;
    entry->behind_until = static_cast<uint32_t>(shared / config.page_tokens * config.page_tokens);
    return true;
  }
  return false;
}

bool Scheduler::State::StillBehind(const Entry& entry) const {
  if (entry.behind_id == 0) return false;
  const auto it = entries.find(entry.behind_id);
  return it != entries.end() && it->second->phase == Entry::Phase::kRunning && it->second->prefilling() &&
         it->second->computed < entry.behind_until;
}

}  // namespace nibble
