// Decides what one replica does next. The step is three calls anyone can say aloud: Schedule, (Send), Commit.
//
// One thread owns a Scheduler; nothing here locks, blocks or knows gRPC. Time comes in as an argument, so a test or a
// simulation decides what time it is.
//
// Run-ahead: Schedule may be called again before the results of earlier plans were committed (up to
// config.max_steps_in_flight). A sequence then decodes from its slot's newest token on the device; a stop found in
// Commit discards what was computed beyond it. Tokens are the same with run-ahead on or off.
//
// Policy (vLLM v1's, SGLang's admission; research sources in docs/scheduling.md): no prefill or decode phase, one token
// budget per step; running sequences first, then waiting ones by (priority, arrival); chunked prefill; prefix reuse by
// whole pages; when pages run out the running sequence with the lowest (priority, latest arrival) is preempted: its
// pages are freed and it is recomputed later from prompt and output.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "nibble/v1/worker.pb.h"
#include "router/sequence.h"

namespace nibble {

struct SchedulerConfig {
  uint32_t num_pages = 0;                // from the workers
  uint32_t page_tokens = 64;
  uint32_t max_sequences = 256;          // slots: running sequences
  uint32_t max_step_tokens = 2048;       // token budget of one step
  uint32_t max_prefill_chunk = 512;      // of one sequence in one step
  uint32_t max_steps_in_flight = 2;      // 1 = no run-ahead
  bool prefix_cache = true;
};

struct SchedulerStats {
  uint32_t running = 0, waiting = 0;
  uint64_t waiting_prompt_tokens = 0;
  uint32_t free_pages = 0, cached_pages = 0, total_pages = 0;   // free includes cached and unreferenced
  uint64_t steps = 0, preemptions = 0;
  uint64_t prefix_queries_tokens = 0, prefix_hits_tokens = 0;
  uint64_t prompt_tokens = 0, generation_tokens = 0;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // The pages of the replica's next incarnation. Only while nothing is running or in flight (new, or after TakeAll).
  // With 0 pages nothing is scheduled and nothing is refused.
  void SetCapacity(uint32_t num_pages);

  // Queues a sequence (new, or replayed with output tokens it already has).
  void Add(std::unique_ptr<Sequence> sequence);
  // Forgets a sequence without an event; its slot and pages are free from the next plan on. Unknown ids are ignored.
  void Cancel(uint64_t sequence_id);

  // The next plan (epoch is the caller's to fill in), or nothing when there is nothing to do now. Sequences past their
  // deadline, or that could never fit, end here: their events are appended.
  std::optional<v1::StepPlan> Schedule(TimePoint now, std::vector<SequenceEvent>* events);
  // Applies the result of the oldest plan in flight. INTERNAL when the result does not match it (the replica is then
  // to be treated as failed).
  absl::Status Commit(const v1::StepResult& result, TimePoint now, std::vector<SequenceEvent>* events);

  uint32_t steps_in_flight() const;
  bool idle() const;                     // nothing running, waiting or in flight
  SchedulerStats stats() const;

  // Prompt tokens of a new request that would come from the prefix cache now. For placement.
  uint32_t CachedPrefixTokens(const std::vector<uint32_t>& token_ids, const std::string& cache_salt) const;

  // The replica is gone: hands back every unfinished sequence (arrival order) for replay and starts from empty: plan
  // steps count from 1 again, nothing is cached, statistics go on. A sequence that was running counts one preemption.
  // Call SetCapacity when the next incarnation has another number of pages.
  std::vector<std::unique_ptr<Sequence>> TakeAll();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace nibble
