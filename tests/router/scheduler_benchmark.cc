// What a scheduler step costs the router: Schedule + Commit in steady decode, by batch and run-ahead, and the size of
// its plan. The control plane's share of a step (docs/performance.md) begins here.
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "benchmark/benchmark.h"
#include "common/base/check.h"
#include "router/scheduler.h"

namespace nibble {
namespace {

constexpr uint32_t kPromptTokens = 100;
constexpr uint32_t kOutputTokens = 500;

std::unique_ptr<Sequence> NewSequence(uint64_t id) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = sequence->arrival = id;
  sequence->num_prompt_tokens = kPromptTokens;
  for (uint32_t i = 0; i < kPromptTokens; ++i) sequence->token_ids.push_back(static_cast<uint32_t>(id * 1000 + i));
  sequence->max_tokens = kOutputTokens;
  sequence->stop_ids = {128001, 128009};
  return sequence;
}

// A replica that always has `batch` running sequences: a new one comes for each that ends.
class BusyReplica {
 public:
  BusyReplica(uint32_t batch, uint32_t run_ahead)
      : scheduler_({.num_pages = 8192, .max_sequences = batch, .max_steps_in_flight = run_ahead}) {
    for (uint32_t i = 0; i < batch; ++i) scheduler_.Add(NewSequence(++next_id_));
    while (scheduler_.stats().waiting > 0) Step();
    for (uint32_t i = 0; i < batch; ++i) Step();
  }

  void Step() {
    while (std::optional<v1::StepPlan> plan = scheduler_.Schedule(now_, &events_)) {
      plan_bytes_ += plan->ByteSizeLong();
      ++steps_;
      v1::StepResult result;
      result.set_step(plan->step());
      int rows = plan->decode_slots_size();
      for (const v1::PrefillChunk& chunk : plan->prefill()) rows += chunk.sample();
      result.mutable_token_ids()->Resize(rows, 17);
      results_.push_back(std::move(result));
    }
    const absl::Status status = scheduler_.Commit(results_.front(), now_, &events_);
    NIBBLE_CHECK(status.ok(), status.ToString());
    results_.pop_front();
    for (const SequenceEvent& event : events_) {
      if (event.finish.has_value()) scheduler_.Add(NewSequence(++next_id_));
    }
    tokens_ += events_.size();
    events_.clear();
  }

  double plan_bytes() const { return static_cast<double>(plan_bytes_) / static_cast<double>(steps_); }
  uint64_t tokens() const { return tokens_; }

 private:
  Scheduler scheduler_;
  TimePoint now_{std::chrono::seconds(1)};
  std::vector<SequenceEvent> events_;
  std::deque<v1::StepResult> results_;
  uint64_t next_id_ = 0, plan_bytes_ = 0, steps_ = 0, tokens_ = 0;
};

void BM_ScheduleAndCommit(benchmark::State& state) {
  BusyReplica replica(static_cast<uint32_t>(state.range(0)), static_cast<uint32_t>(state.range(1)));
  const uint64_t tokens_before = replica.tokens();
  for (auto _ : state) replica.Step();
  state.counters["plan_bytes"] = replica.plan_bytes();
  state.counters["per_token"] = benchmark::Counter(static_cast<double>(replica.tokens() - tokens_before),
                                                   benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}
BENCHMARK(BM_ScheduleAndCommit)
    ->ArgsProduct({{1, 32, 256}, {1, 2}})
    ->ArgNames({"batch", "run_ahead"})
    ->Unit(benchmark::kMicrosecond);

// Admission of a long prompt whose prefix is cached: the walk down the trie.
void BM_CachedPrefixTokens(benchmark::State& state) {
  Scheduler scheduler({.num_pages = 4096, .max_step_tokens = 200000, .max_prefill_chunk = 200000});
  auto sequence = std::make_unique<Sequence>();
  sequence->id = 1;
  sequence->max_tokens = 1;
  sequence->num_prompt_tokens = static_cast<uint32_t>(state.range(0));
  for (uint32_t i = 0; i < sequence->num_prompt_tokens; ++i) sequence->token_ids.push_back(i);
  const std::vector<uint32_t> prompt = sequence->token_ids;
  std::vector<SequenceEvent> events;
  scheduler.Add(std::move(sequence));
  scheduler.Schedule(TimePoint{}, &events);
  for (auto _ : state) benchmark::DoNotOptimize(scheduler.CachedPrefixTokens(prompt, ""));
}
BENCHMARK(BM_CachedPrefixTokens)->Arg(1024)->Arg(131072)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace nibble

BENCHMARK_MAIN();
