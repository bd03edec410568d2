// What a Scheduler keeps, and the moves its three verbs are made of. Private to scheduler*.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "router/output_reserve.h"
#include "router/page_table.h"
#include "router/scheduler.h"

namespace nibble {

// A sequence's place in the scheduler.
//
//   waiting ──Start──► running ──stop, length──► ended
//      ▲                  │
//      └────Preempt───────┘        Cancel, deadline: from anywhere to ended
//
// While running, positions [0, computed) have been scheduled; up to prefill_end they are prefilled from known tokens,
// from there each is the row of the token sampled last, known here (token_ids) or only on the device (in flight).
//
// What every token touches comes first, in one cache line.
struct alignas(64) Entry {
  enum class Phase : uint8_t { kWaiting, kRunning, kEnded };

  std::unique_ptr<Sequence> sequence;  // null once ended
  Phase phase = Phase::kWaiting;
  bool wants_logprobs = false;
  uint32_t slot = 0;
  uint32_t computed = 0;
  uint32_t prefill_end = 0;
  uint32_t samples_in_flight = 0;  // tokens to come
  uint32_t results_in_flight = 0;  // the same plus prompt scores: an ended entry is kept until they came
  PageTable table;

  // While waiting, to look again only when it may help.
  uint32_t retry_when_available = 0;  // pages
  uint64_t retry_at_step = 0;
  uint64_t behind_id = 0;     // a running sequence that is computing this one's prefix ...
  uint32_t behind_until = 0;  // ... up to this position

  bool prefilling() const { return computed < prefill_end; }
  uint32_t known() const { return static_cast<uint32_t>(sequence->token_ids.size()); }
  uint32_t outputs_planned() const { return sequence->num_output_tokens() + samples_in_flight; }
};

// Who goes first: larger priority, then earlier arrival.
struct RanksBefore {
  bool operator()(const Entry* a, const Entry* b) const {
    const Sequence& x = *a->sequence;
    const Sequence& y = *b->sequence;
    if (x.priority != y.priority) return x.priority > y.priority;
    if (x.arrival != y.arrival) return x.arrival < y.arrival;
    return x.id < y.id;
  }
};

// What the result of one plan will hold, in its order.
struct StepInFlight {
  struct Sample {
    Entry* entry;
    uint32_t slot;
  };
  struct PromptScores {
    Entry* entry;
    uint32_t slot;
    uint32_t first_position;
    uint32_t count;
  };
  uint64_t step = 0;
  std::vector<Sample> prefill_samples;  // then
  std::vector<Sample> decode_samples;
  std::vector<PromptScores> prompt_scores;
  uint32_t num_logprobs = 0;  // samples that asked
  uint32_t num_prompt_scores = 0;

  void Clear();
};

// Appends an event that says what the sequence has cost so far.
SequenceEvent& AddEvent(const Sequence& sequence, TimePoint now, std::vector<SequenceEvent>* events);

struct Scheduler::State {
  explicit State(const SchedulerConfig& c);

  // ---- scheduler.cc: coming and going
  void Enqueue(Entry* entry);
  void Dequeue(Entry* entry);
  // Takes a running sequence off its slot: pages and slot are free for the plan being made.
  void Vacate(Entry* entry);
  void Preempt(Entry* entry);
  // The entry leaves the scheduler; what is in flight for it will be discarded.
  std::unique_ptr<Sequence> End(Entry* entry);
  void EndWithError(Entry* entry, absl::Status status, TimePoint now, std::vector<SequenceEvent>* events);
  void EndExpired(TimePoint now, std::vector<SequenceEvent>* events);
  void EndImpossible(TimePoint now, std::vector<SequenceEvent>* events);
  void Clear();

  // ---- scheduler_plan.cc: what a plan is made of
  struct PlanInProgress {
    v1::StepPlan plan;
    StepInFlight* flight;
    uint32_t budget;  // rows left
    TimePoint now;
    bool preempted = false;
  };
  void ScheduleDecodes(PlanInProgress* p);
  void SchedulePrefills(PlanInProgress* p);
  void AdmitWaiting(PlanInProgress* p);
  bool GrowByPreempting(Entry* entry, PlanInProgress* p);
  void ScheduleChunk(Entry* entry, PlanInProgress* p);
  void Start(Entry* entry, const PrefixMatch& match, PlanInProgress* p);
  bool WaitsForPrefix(Entry* entry, const PrefixMatch& match);
  bool StillBehind(const Entry& entry) const;
  uint64_t RemainingOutputs() const;

  // ---- scheduler_commit.cc: what a result is turned into
  absl::Status CheckResult(const StepInFlight& flight, const v1::StepResult& result) const;
  // first: index into result.prompt_logprobs.
  void CommitPromptScores(const StepInFlight::PromptScores& scores, int first, const v1::StepResult& result,
                          TimePoint now, std::vector<SequenceEvent>* events);
  void CommitSample(Entry* entry, uint32_t token_id, const v1::RowLogprobs* logprobs, TimePoint now,
                    std::vector<SequenceEvent>* events);

  SchedulerConfig config;
  PageTables tables;
  OutputReserve reserve;
  SchedulerStats counters;  // the counting half of stats()

  absl::flat_hash_map<uint64_t, std::unique_ptr<Entry>> entries;  // waiting and running, by sequence id
  std::vector<std::unique_ptr<Entry>> ended;                      // only those with results in flight
  std::vector<Entry*> running;                                    // by rank
  absl::btree_set<Entry*, RanksBefore> waiting;
  absl::btree_set<std::pair<TimePoint, uint64_t>> deadlines;  // (deadline, sequence id)
  std::vector<uint64_t> unchecked;                            // added since the last Schedule
  uint64_t waiting_tokens = 0;

  std::vector<uint32_t> free_slots;
  std::vector<uint32_t> released_slots;  // for the next plan to say
  uint64_t step = 0;                     // of the newest plan
  std::vector<StepInFlight> flights;     // ring of max_steps_in_flight
  uint32_t oldest_flight = 0;
  uint32_t num_flights = 0;
};

}  // namespace nibble
