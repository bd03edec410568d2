// Thousands of short, seeded lives of a replica: random arrivals, cancels, deadlines, priorities, shared prefixes, page
// pools so small that preemption is normal, run-ahead of 1 to 3, and replicas that die and hand everything back.
//
// After every step: the plan is valid and every row reads its own prefix only (model_worker.h); pages are conserved;
// every sequence receives exactly the tokens it would have generated alone, and ends exactly once. At the end of a life
// nothing is left: no sequence, no page, no slot.
//
// A failure prints its seed: put it into kFirstSeed, with kNumSeeds = 1.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "router/scheduler.h"
#include "tests/router/model_worker.h"

namespace nibble {
namespace {

using testing::ModelWorker;
using testing::Reference;
using testing::ReferenceOutput;

constexpr uint64_t kFirstSeed = 1;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kNumSeeds = 800;
#else
constexpr uint64_t kNumSeeds = 4000;
#endif

// What happened over all seeds: a simulation that never preempts proves nothing about preemption.
struct Coverage {
  uint64_t finished_by_stop = 0, finished_by_length = 0, cancelled = 0, expired = 0, refused = 0;
  uint64_t preemptions = 0, cached_tokens = 0, replica_losses = 0, replayed_mid_output = 0, run_ahead_discarded = 0;
  uint64_t prompt_scores = 0, steps = 0, tokens = 0;
};

class Simulation {
 public:
  Simulation(uint64_t seed, Coverage* coverage) : random_(seed), coverage_(coverage) {
    page_tokens_ = Pick({2, 4, 8});
    NewIncarnation();
    for (int i = 0; i < 3; ++i) shared_prompts_.push_back(RandomTokens(Between(1, 24)));
  }

  void Run() {
    const int actions = Between(20, 300);
    for (int i = 0; i < actions && !Failed(); ++i) {
      switch (Between(0, 15)) {
        case 0:
        case 1:
        case 2:
          Arrive();
          break;
        case 3:
          if (OneIn(3)) CancelSomeone();
          break;
        case 4:
          if (OneIn(12)) LoseReplica();
          break;
        case 5:
          now_ += std::chrono::milliseconds(Between(0, 40));
          break;
        case 6:
        case 7:
        case 8:
        case 9:
        case 10:
          Schedule();
          break;
        default:
          Commit();
          break;
      }
    }
    Drain();
    CheckNothingIsLeft();
  }

 private:
  struct Client {
    Reference reference;
    std::vector<uint32_t> prompt;
    std::vector<uint32_t> received;
    uint32_t max_tokens = 0;
    uint32_t prompt_scores = 0;
    bool wants_prompt_scores = false, wants_logprobs = false;
    TimePoint deadline;
    bool ended = false;  // by an event
    bool cancelled = false;
  };

  // ---- chance
  uint32_t Between(uint32_t low, uint32_t high) { return std::uniform_int_distribution<uint32_t>(low, high)(random_); }
  bool OneIn(uint32_t n) { return Between(1, n) == 1; }
  uint32_t Pick(std::initializer_list<uint32_t> choices) { return choices.begin()[Between(0, choices.size() - 1)]; }
  std::vector<uint32_t> RandomTokens(uint32_t n) {
    std::vector<uint32_t> tokens(n);
    for (uint32_t& token : tokens) token = Between(0, testing::kVocabSize - 1);
    return tokens;
  }
  static bool Failed() { return ::testing::Test::HasFailure(); }

  // ---- the replica
  void NewIncarnation() {
    config_ = SchedulerConfig{
        .num_pages = (OneIn(4)   ? 24
                      : OneIn(2) ? 60
                                 : 240) /
                         page_tokens_ +
                     Between(0, 8),
        .page_tokens = page_tokens_,
        .max_sequences = Between(1, 12),
        .max_step_tokens = Between(1, 40),
        .max_prefill_chunk = Between(1, 20),
        .max_steps_in_flight = Between(1, 3),
        .prefix_cache = !OneIn(5),
    };
    scheduler_ = std::make_unique<Scheduler>(config_);
    preemptions_seen_ = 0;
    NewWorker();
  }

  void NewWorker() {
    worker_ = std::make_unique<ModelWorker>(ModelWorker::Limits{.num_pages = config_.num_pages,
                                                                .page_tokens = config_.page_tokens,
                                                                .max_sequences = config_.max_sequences,
                                                                .max_step_tokens = config_.max_step_tokens});
    results_.clear();
  }

  void LoseReplica() {
    ++coverage_->replica_losses;
    std::vector<std::unique_ptr<Sequence>> sequences = scheduler_->TakeAll();
    EXPECT_TRUE(scheduler_->idle());
    EXPECT_EQ(scheduler_->stats().free_pages, config_.num_pages);
    size_t live = 0;
    for (const auto& [id, client] : clients_) live += !client.ended && !client.cancelled;
    EXPECT_EQ(sequences.size(), live) << "a lost replica hands back every unfinished sequence";
    if (OneIn(2)) {
      NewIncarnation();  // another replica, with other limits
    } else {
      config_.num_pages = 40 / page_tokens_ + Between(0, 12);
      scheduler_->SetCapacity(config_.num_pages);
      NewWorker();
    }
    uint64_t last_arrival = 0;
    for (std::unique_ptr<Sequence>& sequence : sequences) {
      EXPECT_GT(sequence->arrival, last_arrival);
      last_arrival = sequence->arrival;
      const Client& client = clients_.at(sequence->id);
      std::vector<uint32_t> expected = client.prompt;
      expected.insert(expected.end(), client.received.begin(), client.received.end());
      EXPECT_EQ(sequence->token_ids, expected) << "a replay continues what the client has seen";
      coverage_->replayed_mid_output += !client.received.empty();
      scheduler_->Add(std::move(sequence));
    }
  }

  void Schedule() {
    const uint32_t in_flight = scheduler_->steps_in_flight();
    std::vector<SequenceEvent> events;
    const std::optional<v1::StepPlan> plan = scheduler_->Schedule(now_, &events);
    Receive(events);
    if (!plan.has_value()) {
      EXPECT_TRUE(in_flight > 0 || scheduler_->idle()) << "nothing is in flight, work waits, and nothing is scheduled";
      return;
    }
    EXPECT_LT(in_flight, config_.max_steps_in_flight);
    EXPECT_EQ(scheduler_->steps_in_flight(), in_flight + 1);
    const absl::Status status = worker_->Execute(*plan, &results_.emplace_back());
    EXPECT_TRUE(status.ok()) << status.message() << "\n" << plan->DebugString();
    const SchedulerStats stats = scheduler_->stats();
    EXPECT_EQ(stats.free_pages + worker_->num_held_pages(), config_.num_pages) << "pages are conserved";
    EXPECT_EQ(stats.running, worker_->num_live_slots());
    EXPECT_LE(stats.cached_pages, config_.num_pages);
    ++coverage_->steps;
    coverage_->preemptions += stats.preemptions - std::exchange(preemptions_seen_, stats.preemptions);
  }

  void Commit() {
    if (results_.empty()) return;
    std::vector<SequenceEvent> events;
    const v1::StepResult result = std::move(results_.front());
    results_.pop_front();
    const absl::Status status = scheduler_->Commit(result, now_, &events);
    EXPECT_TRUE(status.ok()) << status.message();
    uint64_t tokens = 0;
    for (const SequenceEvent& event : events) tokens += event.token_id.has_value();
    coverage_->run_ahead_discarded += result.token_ids_size() - tokens;
    Receive(events);
  }

  // ---- the clients
  void Arrive() {
    const uint32_t n = OneIn(6) ? Between(2, 4) : 1;  // siblings of one request
    std::vector<uint32_t> prompt;
    if (!OneIn(3)) {
      prompt = shared_prompts_[Between(0, shared_prompts_.size() - 1)];
      if (OneIn(3)) prompt.resize(Between(1, prompt.size()));
    }
    if (prompt.empty() || OneIn(2)) {
      const std::vector<uint32_t> tail = RandomTokens(Between(1, 20));
      prompt.insert(prompt.end(), tail.begin(), tail.end());
    }
    Sequence common;
    common.num_prompt_tokens = static_cast<uint32_t>(prompt.size());
    common.max_tokens = Between(1, 24);
    common.min_tokens = OneIn(3) ? Between(0, common.max_tokens) : 0;
    for (uint32_t i = Between(0, 2); i > 0; --i) common.stop_ids.push_back(Between(0, testing::kVocabSize - 1));
    std::sort(common.stop_ids.begin(), common.stop_ids.end());
    common.priority = OneIn(4) ? static_cast<int32_t>(Between(0, 4)) - 2 : 0;
    common.deadline = OneIn(8) ? now_ + std::chrono::milliseconds(Between(0, 200)) : TimePoint::max();
    common.cache_salt = OneIn(5) ? "tenant" : "";
    common.sampling.set_min_tokens(common.min_tokens);
    if (common.min_tokens > 0) {
      common.sampling.mutable_suppressed_ids()->Add(common.stop_ids.begin(), common.stop_ids.end());
    }
    common.sampling.set_logprobs(OneIn(4));
    common.sampling.set_prompt_logprobs(OneIn(6));
    common.use_prefix_cache = !common.sampling.prompt_logprobs();
    common.token_ids = prompt;
    const uint64_t seed = OneIn(2) ? 7 : Between(0, 1000);  // equal seeds make equal outputs, which share pages
    for (uint32_t i = 0; i < n; ++i) {
      auto sequence = std::make_unique<Sequence>(common);
      sequence->id = sequence->arrival = next_id_++;
      sequence->index = i;
      sequence->sampling.set_seed(seed + i);
      clients_[sequence->id] = Client{.reference = ReferenceOutput(*sequence),
                                      .prompt = prompt,
                                      .max_tokens = common.max_tokens,
                                      .wants_prompt_scores = common.sampling.prompt_logprobs(),
                                      .wants_logprobs = common.sampling.logprobs(),
                                      .deadline = common.deadline};
      scheduler_->Add(std::move(sequence));
    }
  }

  void CancelSomeone() {
    if (clients_.empty()) return;
    const uint64_t id = Between(1, next_id_ - 1);
    Client& client = clients_.at(id);
    scheduler_->Cancel(id);  // harmless when it has ended already
    if (client.ended || client.cancelled) return;
    client.cancelled = true;
    ++coverage_->cancelled;
  }

  void Receive(const std::vector<SequenceEvent>& events) {
    std::map<uint64_t, int> events_of;
    for (const SequenceEvent& event : events) {
      EXPECT_LE(++events_of[event.sequence_id], 2) << "per sequence and step prompt scores and a token, or an end";
      Client& client = clients_.at(event.sequence_id);
      EXPECT_FALSE(client.ended) << "sequence " << event.sequence_id << " has an event after its last";
      EXPECT_FALSE(client.cancelled) << "sequence " << event.sequence_id << " has an event after Cancel";
      ReceiveScores(event, &client);
      if (event.token_id.has_value()) {
        client.received.push_back(*event.token_id);
        ++coverage_->tokens;
        EXPECT_EQ(event.scores != nullptr, client.wants_logprobs);
        if (event.scores != nullptr) {
          EXPECT_EQ(event.scores->logprobs.value().token_id(), *event.token_id);
        }
        EXPECT_LE(client.received.size(), client.reference.output.size());
        EXPECT_TRUE(std::equal(client.received.begin(), client.received.end(), client.reference.output.begin()))
            << "sequence " << event.sequence_id << " differs from the undisturbed run at output "
            << client.received.size() - 1;
      }
      if (event.finish.has_value()) ReceiveFinish(event, &client);
      if (!event.status.ok()) ReceiveError(event, &client);
      if (Failed()) return;
    }
  }

  void ReceiveScores(const SequenceEvent& event, Client* client) {
    if (event.scores != nullptr) {
      for (const v1::RowLogprobs& score : event.scores->prompt_logprobs) {
        ++client->prompt_scores;
        ++coverage_->prompt_scores;
        ASSERT_LT(client->prompt_scores, client->prompt.size());
        EXPECT_EQ(score.token_id(), client->prompt[client->prompt_scores]);
        EXPECT_EQ(score.logprob(), -static_cast<float>(client->prompt_scores)) << "positions in order, none twice";
      }
    }
    if (event.token_id.has_value() && client->wants_prompt_scores) {
      EXPECT_EQ(client->prompt_scores + 1, client->prompt.size()) << "all prompt scores come before the first token";
    }
  }

  void ReceiveFinish(const SequenceEvent& event, Client* client) {
    client->ended = true;
    EXPECT_EQ(client->received, client->reference.output);
    EXPECT_EQ(*event.finish, client->reference.finish);
    EXPECT_LT(event.cached_tokens, client->prompt.size());
    EXPECT_EQ(event.cached_tokens % page_tokens_, 0u);
    coverage_->cached_tokens += event.cached_tokens;
    ++(*event.finish == v1::FINISH_REASON_STOP ? coverage_->finished_by_stop : coverage_->finished_by_length);
  }

  void ReceiveError(const SequenceEvent& event, Client* client) {
    client->ended = true;
    if (event.status.code() == absl::StatusCode::kDeadlineExceeded) {
      EXPECT_LE(client->deadline, now_);
      ++coverage_->expired;
    } else {
      EXPECT_EQ(event.status.code(), absl::StatusCode::kResourceExhausted) << event.status;
      EXPECT_GT(client->prompt.size() + client->max_tokens - 1, uint64_t{config_.num_pages} * page_tokens_);
      ++coverage_->refused;
    }
  }

  // ---- the end
  void Drain() {
    // Every pair of calls moves at least one row of at least one sequence; preemptions redo work, hence the factor.
    uint64_t bound = 1000;
    for (const auto& [id, client] : clients_) bound += 20 * (client.prompt.size() + client.max_tokens);
    while (!scheduler_->idle() && !Failed()) {
      ASSERT_GT(bound--, 0u) << "somebody starves";
      Schedule();
      if (OneIn(2) || scheduler_->steps_in_flight() == config_.max_steps_in_flight) Commit();
      if (OneIn(50)) CancelSomeone();
    }
  }

  void CheckNothingIsLeft() {
    if (Failed()) return;
    for (const auto& [id, client] : clients_) EXPECT_NE(client.ended, client.cancelled) << "sequence " << id;
    const SchedulerStats stats = scheduler_->stats();
    EXPECT_EQ(stats.free_pages, config_.num_pages);
    EXPECT_EQ(stats.running, 0u);
    EXPECT_EQ(stats.waiting, 0u);
    EXPECT_EQ(stats.waiting_prompt_tokens, 0u);
    EXPECT_TRUE(results_.empty());
  }

  std::mt19937_64 random_;
  Coverage* coverage_;
  uint32_t page_tokens_ = 0;
  SchedulerConfig config_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ModelWorker> worker_;
  std::deque<v1::StepResult> results_;  // computed, on their way back
  std::vector<std::vector<uint32_t>> shared_prompts_;
  std::map<uint64_t, Client> clients_;
  uint64_t next_id_ = 1;
  uint64_t preemptions_seen_ = 0;  // of this scheduler
  TimePoint now_{std::chrono::seconds(1)};
};

TEST(SchedulerSimulation, EverySequenceGetsItsOwnTokensOnceWhateverHappens) {
  Coverage coverage;
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + kNumSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation(seed, &coverage).Run();
    if (HasFailure()) return;
  }
  const std::pair<const char*, uint64_t> counts[] = {
      {"steps", coverage.steps},
      {"tokens", coverage.tokens},
      {"finished by stop", coverage.finished_by_stop},
      {"finished by length", coverage.finished_by_length},
      {"cancelled", coverage.cancelled},
      {"deadline expired", coverage.expired},
      {"refused, too large", coverage.refused},
      {"preemptions", coverage.preemptions},
      {"prompt tokens from the cache", coverage.cached_tokens},
      {"replica losses", coverage.replica_losses},
      {"replayed mid-output", coverage.replayed_mid_output},
      {"samples discarded", coverage.run_ahead_discarded},
      {"prompt scores", coverage.prompt_scores},
  };
  for (const auto& [what, count] : counts) {
    printf("%-32s %10lu\n", what, static_cast<unsigned long>(count));
    EXPECT_GT(count, kNumSeeds / 4) << "the simulation hardly exercises: " << what;
  }
}

}  // namespace
}  // namespace nibble
