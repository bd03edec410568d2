#include "router/replica.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "router/output.h"

namespace nibble {

const char* ReplicaStateName(ReplicaState state) {
  switch (state) {
    case ReplicaState::kConnecting: return "connecting";
    case ReplicaState::kLoading: return "loading";
    case ReplicaState::kReady: return "ready";
    case ReplicaState::kDown: return "down";
  }
  return "unknown";
}

// One formed group with its scheduler and streams, from Join to the failure.
struct Replica::Incarnation {
  struct Flight {
    TimePoint sent_at;
    size_t rows = 0;
  };

  const uint64_t epoch;
  const std::vector<uint64_t> instances;     // of the workers, by rank
  Scheduler scheduler;
  RankStreams streams;
  std::deque<Flight> flights = {};           // steps in flight, oldest first
  TimePoint due = TimePoint::max();          // when the oldest step in flight must have been answered
  uint64_t steps_committed = 0;
  TimePoint next_ping{};
  uint32_t pings_in_flight = 0;
  uint64_t steps_at_ping = 0;
  std::string draining = {};                 // the address of a worker that is, else empty
  CpuMeter meter = {};
  ReplicaMetrics::Cpu cpu = {};              // of this round
};

Replica::Replica(const ReplicaOptions& options, std::vector<std::string> addresses,
                 const std::vector<std::shared_ptr<grpc::Channel>>& channels, ModelAgreement* agreement,
                 ReplicaObserver* observer, ReplicaMetrics* metrics)
    : options_(options),
      group_(std::move(addresses), channels),
      agreement_(agreement),
      observer_(observer),
      metrics_(metrics),
      inbox_(std::make_shared<Inbox<Message>>(options.inbox_messages)) {
  report_.index = options_.index;
  report_.workers = group_.addresses();
}

Replica::~Replica() { Stop(); }

void Replica::Start() { thread_ = std::thread(&Replica::Run, this); }

void Replica::Stop() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  stop_changed_.notify_all();
  group_.Interrupt();
  inbox_->PutUrgent(Wake{});
  thread_.join();
}

bool Replica::Add(std::unique_ptr<Sequence>* sequence) {
  const uint32_t tokens = (*sequence)->num_prompt_tokens;
  Message message = AddMessage{std::move(*sequence)};
  std::lock_guard<std::mutex> lock(mutex_);  // counted before the thread can count it out again
  if (inbox_->Put(std::move(message))) {
    ++inbox_adds_;
    inbox_tokens_ += tokens;
    return true;
  }
  *sequence = std::move(std::get<AddMessage>(message).sequence);
  return false;
}

void Replica::Cancel(uint64_t sequence_id) {
  // A replica that is down has no sequences; those it is just losing are asked SequenceCancelled by whoever takes them.
  if (serving_) inbox_->PutUrgent(CancelMessage{sequence_id});
}

ReplicaReport Replica::report() const {
  std::lock_guard<std::mutex> lock(mutex_);
  ReplicaReport report = report_;
  report.stats.waiting += inbox_adds_;
  if (Clock::now() - published_at_ > std::chrono::seconds(2)) report.generation_tokens_per_second = 0;
  return report;
}

ReplicaSnapshot Replica::snapshot() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const SchedulerStats& stats = report_.stats;
  return {.replica = options_.index,
          .ready = report_.ready,
          .running = stats.running,
          .waiting = stats.waiting + inbox_adds_,
          .max_sequences = options_.scheduler.max_sequences,
          .waiting_prompt_tokens = stats.waiting_prompt_tokens + inbox_tokens_,
          .free_pages = stats.free_pages,
          .total_pages = stats.total_pages};
}

Replica::Queue Replica::queue() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const SchedulerStats& stats = report_.stats;
  const uint32_t all = stats.running + stats.waiting + inbox_adds_;
  const uint32_t slots = options_.scheduler.max_sequences;
  return {.sequences = all > slots ? all - slots : 0, .prompt_tokens = stats.waiting_prompt_tokens + inbox_tokens_};
}

void Replica::Run() {
  std::chrono::milliseconds backoff = options_.min_backoff;
  while (!stopping_) {
    bool served = false;
    const absl::Status ended = FormAndServe(&served);
    if (stopping_) break;
    if (served) backoff = options_.min_backoff;
    SetError(ended);
    SetState(ReplicaState::kDown, false);
    if (served || ended.message() != logged_error_) {  // the same failure every two seconds is one line
      LogWarn("replica down replica={} epoch={} code={} error=\"{}\"", options_.index, epoch_,
              absl::StatusCodeToString(ended.code()), std::string(ended.message()));
      logged_error_ = std::string(ended.message());
    }
    if (!SleepUnlessStopped(backoff)) break;
    backoff = std::min(backoff * 2, options_.max_backoff);
  }
  SetState(ReplicaState::kDown, false);
}

absl::Status Replica::FormAndServe(bool* served) {
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<v1::WorkerInfo> infos, group_.GetInfo(options_.info_timeout));
  NIBBLE_RETURN_IF_ERROR(agreement_->Check(group_.addresses(), infos));

  SetState(ReplicaState::kLoading, false);
  // Epochs also grow over restarts of the router: workers ignore those of the past.
  const auto unix_time = std::chrono::system_clock::now().time_since_epoch();
  epoch_ = std::max(epoch_ + 1, static_cast<uint64_t>(
                                    std::chrono::duration_cast<std::chrono::microseconds>(unix_time).count()));
  const TimePoint start = Clock::now();
  SchedulerConfig config = options_.scheduler;
  absl::StatusOr<GroupCapacity> capacity = [&]() -> absl::StatusOr<GroupCapacity> {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<std::string> endpoints, group_.Prepare(epoch_, options_.load_timeout));
    return group_.Join(epoch_, endpoints, config.max_sequences, config.max_step_tokens, options_.join_timeout);
  }();
  if (!capacity.ok()) {
    group_.Abort(epoch_, std::string(capacity.status().message()), options_.abort_timeout);
    return capacity.status();
  }
  config.num_pages = capacity->num_pages;
  config.page_tokens = capacity->page_tokens;

  std::vector<uint64_t> instances;
  for (const v1::WorkerInfo& info : infos) instances.push_back(info.instance());
  RankStreamsEvents events{
      .on_step = [inbox = inbox_, epoch = epoch_](v1::StepResult result, uint32_t slowest_forward_us) {
        inbox->PutUrgent(StepDone{epoch, std::move(result), slowest_forward_us});
      },
      .on_broken = [inbox = inbox_, epoch = epoch_](uint32_t rank, absl::Status why) {
        inbox->PutUrgent(Broken{epoch, rank, std::move(why)});
      }};
  Incarnation life{.epoch = epoch_,
                   .instances = std::move(instances),
                   .scheduler = Scheduler(config),
                   .streams = RankStreams(group_, config.max_steps_in_flight, std::move(events), metrics_)};
  metrics_->Reset();
  metrics_->SetCapacity(config.num_pages, config.page_tokens);
  *served = true;
  logged_error_.clear();
  LogInfo("replica ready replica={} epoch={} workers={} pages={} page_tokens={} forming_ms={}", options_.index, epoch_,
          group_.world_size(), config.num_pages, config.page_tokens,
          std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count());
  Publish(life.scheduler.stats(), Clock::now());
  serving_ = true;
  inbox_->Open();
  SetState(ReplicaState::kReady, true);

  absl::Status why = Serve(&life);
  why = TakeDown(&life, std::move(why));
  return why;
}

absl::Status Replica::Serve(Incarnation* life) {
  life->next_ping = Clock::now() + options_.ping_interval;
  while (true) {
    inbox_->Take(std::min(life->due, life->next_ping), &messages_);
    if (stopping_) return absl::CancelledError("the router is stopping");
    for (Message& message : messages_) NIBBLE_RETURN_IF_ERROR(Handle(&message, life));
    const TimePoint now = Clock::now();
    if (now >= life->due) {
      return absl::DeadlineExceededError(absl::StrCat(
          "worker ", group_.addresses()[life->streams.MissingRank()], ": did not answer step ", life->steps_committed + 1,
          " within ", options_.step_timeout.count(), " ms (step-timeout-ms)"));
    }
    SendPlans(life);
    DeliverEvents(life);
    Publish(life->scheduler.stats(), now);
    if (now >= life->next_ping) SendPings(life);
    life->meter.Charge(&life->cpu.other_seconds);
    metrics_->Count(std::exchange(life->cpu, {}));
    if (!life->draining.empty() && life->scheduler.idle()) {
      return absl::UnavailableError(absl::StrCat("worker ", life->draining, ": is draining"));
    }
  }
}

absl::Status Replica::Handle(Message* message, Incarnation* life) {
  if (auto* add = std::get_if<AddMessage>(message)) {
    ++handled_adds_;
    handled_tokens_ += add->sequence->num_prompt_tokens;
    // Cancelled between two replicas: the cancel may have passed here before the sequence did.
    if (!SequenceCancelled(*add->sequence)) life->scheduler.Add(std::move(add->sequence));
    add->sequence.reset();
  } else if (auto* cancel = std::get_if<CancelMessage>(message)) {
    life->scheduler.Cancel(cancel->sequence_id);
  } else if (auto* done = std::get_if<StepDone>(message)) {
    if (done->epoch != life->epoch) return absl::OkStatus();
    if (life->flights.empty()) {
      return absl::InternalError(
          absl::StrCat("the workers answered step ", done->result.step(), ", and none was on its way"));
    }
    const TimePoint now = Clock::now();
    life->meter.Charge(&life->cpu.other_seconds);
    NIBBLE_RETURN_IF_ERROR(life->scheduler.Commit(done->result, now, &events_));
    life->meter.Charge(&life->cpu.commit_seconds);
    ++life->steps_committed;
    const Incarnation::Flight& flight = life->flights.front();
    metrics_->ObserveStep(done->slowest_forward_us * 1e-6,
                          std::chrono::duration<double>(now - flight.sent_at).count(), flight.rows);
    life->flights.pop_front();
    life->due = life->flights.empty() ? TimePoint::max() : now + options_.step_timeout;
  } else if (auto* broken = std::get_if<Broken>(message)) {
    if (broken->epoch != life->epoch) return absl::OkStatus();
    const std::string worker = absl::StrCat("worker ", group_.addresses()[broken->rank]);
    if (!broken->why.ok()) return Annotate(broken->why, worker);
    return absl::UnavailableError(absl::StrCat(worker, ": its Execute stream ended"));
  } else if (auto* pong = std::get_if<Pong>(message)) {
    if (pong->epoch != life->epoch) return absl::OkStatus();
    --life->pings_in_flight;
    const bool progress = life->steps_committed != life->steps_at_ping;
    if (absl::IsDeadlineExceeded(pong->status) && progress) return absl::OkStatus();  // busy, not dead
    NIBBLE_RETURN_IF_ERROR(pong->status);
    if (pong->instance != life->instances[pong->rank]) {
      return absl::UnavailableError(absl::StrCat("worker ", group_.addresses()[pong->rank], ": was restarted"));
    }
    if (pong->draining && life->draining.empty()) {
      life->draining = group_.addresses()[pong->rank];
      LogInfo("worker drains replica={} worker={}", options_.index, life->draining);
      inbox_->Close();
      SetState(ReplicaState::kReady, false);
    }
  }
  return absl::OkStatus();
}

void Replica::SendPlans(Incarnation* life) {
  life->meter.Charge(&life->cpu.other_seconds);
  while (life->scheduler.steps_in_flight() < options_.scheduler.max_steps_in_flight) {
    const TimePoint now = Clock::now();
    std::optional<v1::StepPlan> plan = life->scheduler.Schedule(now, &events_);
    if (!plan.has_value()) break;
    if (plan->step() == 1) plan->set_epoch(life->epoch);
    size_t rows = static_cast<size_t>(plan->decode_slots_size());
    for (const v1::PrefillChunk& chunk : plan->prefill()) rows += chunk.num_tokens();
    life->streams.Send(*std::move(plan));
    if (life->flights.empty()) life->due = now + options_.step_timeout;
    life->flights.push_back({now, rows});
  }
  life->meter.Charge(&life->cpu.schedule_seconds);
}

void Replica::DeliverEvents(Incarnation* life) {
  if (events_.empty()) return;
  life->meter.Charge(&life->cpu.other_seconds);
  observer_->OnEvents(&events_);
  life->meter.Charge(&life->cpu.commit_seconds);
}

void Replica::SendPings(Incarnation* life) {
  life->next_ping = Clock::now() + options_.ping_interval;
  if (life->pings_in_flight > 0) return;
  life->steps_at_ping = life->steps_committed;
  for (uint32_t rank = 0; rank < group_.world_size(); ++rank) {
    ++life->pings_in_flight;
    group_.Ping(rank, options_.step_timeout,
                [inbox = inbox_, epoch = life->epoch, rank](absl::Status status, const v1::WorkerInfo& info) {
                  inbox->PutUrgent(Pong{epoch, rank, std::move(status), info.instance(), info.draining()});
                });
  }
}

absl::Status Replica::TakeDown(Incarnation* life, absl::Status why) {
  serving_ = false;
  inbox_->Close();
  SetState(ReplicaState::kDown, false);
  metrics_->CountFailure();
  DeliverEvents(life);  // of the steps committed before the failure: a replay continues behind them
  // A worker that ended its stream said why; a cancelled one has nothing to say.
  const std::vector<absl::Status> ends = life->streams.Close();
  for (size_t rank = 0; rank < ends.size(); ++rank) {
    if (ends[rank].ok() || absl::IsCancelled(ends[rank]) || absl::IsDeadlineExceeded(why)) continue;
    why = Annotate(ends[rank], absl::StrCat("worker ", group_.addresses()[rank]));
    break;
  }

  std::vector<std::unique_ptr<Sequence>> lost = life->scheduler.TakeAll();
  std::vector<Message> late;
  inbox_->Take(Clock::now(), &late);
  for (std::vector<Message>* left : {&messages_, &late}) {
    for (Message& message : *left) {
      if (auto* add = std::get_if<AddMessage>(&message)) {
        if (add->sequence == nullptr) continue;
        ++handled_adds_;
        handled_tokens_ += add->sequence->num_prompt_tokens;
        lost.push_back(std::move(add->sequence));
      }
    }
    left->clear();
  }
  metrics_->Update({});
  steps_before_ += life->scheduler.stats().steps;
  Publish({}, Clock::now());
  SetError(why);  // before any client hears of it
  if (!lost.empty()) {
    metrics_->CountReplayed(lost.size());
    observer_->OnSequencesLost(options_.index, std::move(lost), why);
  }
  group_.Abort(life->epoch, std::string(why.message()), options_.abort_timeout);
  return why;
}

void Replica::SetState(ReplicaState state, bool ready) {
  bool changed = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    changed = report_.ready != ready;
    report_.state = state;
    report_.ready = ready;
  }
  if (!changed) return;
  metrics_->SetReady(ready);
  observer_->OnReadyChanged(options_.index, ready);
}

void Replica::SetError(const absl::Status& error) {
  std::lock_guard<std::mutex> lock(mutex_);
  report_.last_error = std::string(error.message());
}

void Replica::Publish(const SchedulerStats& stats, TimePoint now) {
  metrics_->Update(stats);
  std::lock_guard<std::mutex> lock(mutex_);
  report_.stats = stats;
  report_.stats.steps += steps_before_;
  inbox_adds_ -= std::exchange(handled_adds_, 0);
  inbox_tokens_ -= std::exchange(handled_tokens_, 0);
  published_at_ = now;
  if (stats.generation_tokens < rate_tokens_) rate_tokens_ = 0;
  const std::chrono::duration<double> since = now - rate_since_;
  if (since.count() >= 1) {
    report_.generation_tokens_per_second = static_cast<double>(stats.generation_tokens - rate_tokens_) / since.count();
    rate_since_ = now;
    rate_tokens_ = stats.generation_tokens;
  }
}

bool Replica::SleepUnlessStopped(std::chrono::milliseconds duration) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !stop_changed_.wait_for(lock, duration, [this] { return stopping_.load(); });
}

}  // namespace nibble
