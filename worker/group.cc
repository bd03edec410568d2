#include "worker/group.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/base/log.h"
#include "common/base/status.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

bool EngineSlot::Acquire(const std::function<bool()>& give_up) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !taken_ || give_up(); });
  if (taken_) return false;
  taken_ = true;
  return true;
}

void EngineSlot::Release() {
  {
    std::lock_guard lock(mutex_);
    taken_ = false;
  }
  changed_.notify_all();
}

void EngineSlot::Poke() {
  { std::lock_guard lock(mutex_); }  // a waiter is either before its test or asleep, not between
  changed_.notify_all();
}

const char* Group::StateName(State state) {
  switch (state) {
    case State::kLoading:
      return "loading";
    case State::kPrepared:
      return "prepared";
    case State::kJoining:
      return "joining";
    case State::kServing:
      return "serving";
  }
  return "?";
}

Group::Group(const GroupOptions& options, Backend* backend, EngineSlot* slot, WorkerMetrics* metrics, PrepareDone done)
    : options_(options), backend_(backend), slot_(slot), metrics_(metrics), prepare_done_(std::move(done)) {
  thread_ = std::thread([this] { Run(); });
}

Group::~Group() {
  Abort(absl::CancelledError("the worker leaves the group"));
  thread_.join();
}

void Group::Join(v1::JoinRequest request, JoinDone done) {
  absl::Status refused;
  {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) {
      refused = Annotate(failure_, fmt::format("epoch {} has failed, prepare a larger one", epoch()));
    } else if (state_ != State::kPrepared) {
      refused = absl::FailedPreconditionError(
          fmt::format("epoch {} is {}, must be prepared to be joined", epoch(), StateName(state_)));
    } else {
      state_ = State::kJoining;
      join_request_ = std::move(request);
      join_done_ = std::move(done);
    }
  }
  if (!refused.ok()) return done(refused);
  wake_.notify_all();
}

absl::Status Group::OpenStream(std::shared_ptr<ResultSink> sink) {
  std::shared_ptr<ResultSink> old;
  {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) {
      return absl::FailedPreconditionError(
          fmt::format("epoch {} has failed, prepare a larger one: {}", epoch(), std::string(failure_.message())));
    }
    if (state_ != State::kServing) {
      return absl::FailedPreconditionError(
          fmt::format("epoch {} is {}, must be joined to execute plans", epoch(), StateName(state_)));
    }
    old = std::exchange(stream_, std::move(sink));
    plans_.clear();
    stream_changed_ = true;
    input_ended_ = false;
  }
  wake_.notify_all();
  if (old != nullptr) old->Finish(absl::AbortedError("a newer Execute stream took over"));
  return absl::OkStatus();
}

absl::Status Group::Submit(const ResultSink* sink, v1::StepPlan plan) {
  {
    std::lock_guard lock(mutex_);
    if (stream_.get() != sink) return absl::OkStatus();  // whoever took the stream away tells it why
    if (plans_.size() >= kMaxQueuedPlans) {
      return absl::ResourceExhaustedError(
          fmt::format("plans in flight: {} are queued, the limit is {}", plans_.size(), kMaxQueuedPlans));
    }
    plans_.push_back(std::move(plan));
  }
  wake_.notify_all();
  return absl::OkStatus();
}

void Group::EndInput(const ResultSink* sink) {
  {
    std::lock_guard lock(mutex_);
    if (stream_.get() != sink) return;
    input_ended_ = true;
  }
  wake_.notify_all();
}

void Group::DropStream(const ResultSink* sink) {
  {
    std::lock_guard lock(mutex_);
    if (stream_.get() != sink) return;
    stream_ = nullptr;
    plans_.clear();
    stream_changed_ = true;
  }
  wake_.notify_all();
}

void Group::Abort(const absl::Status& status) {
  PrepareDone prepare_done;
  JoinDone join_done;
  std::shared_ptr<Communicator> communicator;
  std::shared_ptr<ResultSink> stream;
  {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) return;
    failure_ = status;
    prepare_done = std::exchange(prepare_done_, nullptr);
    join_done = std::exchange(join_done_, nullptr);
    communicator = communicator_;
    stream = std::exchange(stream_, nullptr);
    plans_.clear();
  }
  wake_.notify_all();
  slot_->Poke();
  // Callers first: once collectives fail, the group's thread would report the symptom before they hear the cause.
  if (prepare_done) prepare_done(status);
  if (join_done) join_done(status);
  if (stream != nullptr) stream->Finish(status);
  if (communicator != nullptr) communicator->Abort(std::string(status.message()));
}

bool Group::aborted() const {
  std::lock_guard lock(mutex_);
  return !failure_.ok();
}

std::shared_ptr<Communicator> Group::communicator() const {
  std::lock_guard lock(mutex_);
  return communicator_;
}

bool Group::idle() const {
  std::lock_guard lock(mutex_);
  return !failure_.ok() || (plans_.empty() && !executing_ && num_sequences_ == 0 && state_ != State::kJoining);
}

bool Group::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

void Group::Run() {
  absl::Status status = LoadShard();
  if (status.ok()) status = ServeOneGroup();
  // A failure that nobody asked for: tell whoever waits. After Abort this changes nothing.
  if (!aborted()) LogError("group failed epoch={} rank={} status=\"{}\"", epoch(), options_.rank, status.ToString());
  Abort(status);
  shard_ = nullptr;
  rendezvous_ = nullptr;
  std::lock_guard lock(mutex_);
  communicator_ = nullptr;
  num_sequences_ = 0;
  ended_ = true;
}

absl::Status Group::LoadShard() {
  const auto start = Clock::now();
  NIBBLE_ASSIGN_OR_RETURN(shard_, backend_->Load(options_.rank, options_.world_size));
  metrics_->load_seconds.Set(SecondsSince(start));
  NIBBLE_ASSIGN_OR_RETURN(rendezvous_, backend_->PrepareCommunicator(options_.rank, options_.world_size));
  v1::PrepareResponse response;
  response.set_endpoint(rendezvous_->endpoint());
  PrepareDone done;
  {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    state_ = State::kPrepared;
    done = std::exchange(prepare_done_, nullptr);
  }
  LogInfo("group prepared epoch={} rank={} world_size={} load_ms={:.0f}", epoch(), options_.rank, options_.world_size,
          SecondsSince(start) * 1e3);
  done(std::move(response));
  return absl::OkStatus();
}

absl::Status Group::ServeOneGroup() {
  v1::JoinRequest request;
  {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [&] { return !failure_.ok() || state_ == State::kJoining; });
    if (!failure_.ok()) return failure_;
    request = std::move(join_request_);
  }
  const auto start = Clock::now();
  NIBBLE_RETURN_IF_ERROR(Connect(request));
  if (!slot_->Acquire([this] { return aborted(); })) return absl::AbortedError("the group was aborted");
  absl::StatusOr<std::unique_ptr<Engine>> engine = MakeEngine(request, start);
  absl::Status status = engine.ok() ? ExecutePlans(**engine) : engine.status();
  engine = absl::CancelledError("");  // the engine dies before the slot is free
  metrics_->pages.Set(0);
  slot_->Release();
  return status;
}

// Before the engine slot is taken: meeting peers that never come must not keep the next group from its engine.
absl::Status Group::Connect(const v1::JoinRequest& request) {
  const std::vector<std::string> endpoints(request.endpoints().begin(), request.endpoints().end());
  NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<Communicator> communicator, rendezvous_->Connect(endpoints));
  std::lock_guard lock(mutex_);
  if (!failure_.ok()) return failure_;
  communicator_ = std::move(communicator);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Engine>> Group::MakeEngine(const v1::JoinRequest& request, Clock::time_point start) {
  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                          shard_->CreateEngine(communicator(), {.kv_memory_bytes = options_.kv_memory_bytes,
                                                                .max_sequences = request.max_sequences(),
                                                                .max_step_tokens = request.max_step_tokens()}));
  started_.assign(request.max_sequences(), false);
  metrics_->pages.Set(static_cast<double>(engine->num_pages()));
  metrics_->page_bytes.Set(static_cast<double>(engine->kv_page_bytes()));
  v1::JoinResponse response;
  response.set_num_pages(static_cast<uint32_t>(std::min<int64_t>(engine->num_pages(), UINT32_MAX)));
  response.set_page_tokens(static_cast<uint32_t>(kPageTokens));
  response.set_kv_page_bytes(static_cast<uint64_t>(engine->kv_page_bytes()));
  JoinDone done;
  {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    state_ = State::kServing;
    done = std::exchange(join_done_, nullptr);
  }
  LogInfo("group joined epoch={} rank={} world_size={} pages={} page_bytes={} join_ms={:.0f}", epoch(), options_.rank,
          options_.world_size, response.num_pages(), response.kv_page_bytes(), SecondsSince(start) * 1e3);
  done(std::move(response));
  return engine;
}

absl::Status Group::ExecutePlans(Engine& engine) {
  while (true) {
    std::shared_ptr<ResultSink> sink;
    v1::StepPlan plan;
    bool drop_sequences = false;
    bool finish = false;
    {
      std::unique_lock lock(mutex_);
      executing_ = false;
      wake_.wait(lock, [&] {
        return !failure_.ok() || stream_changed_ || !plans_.empty() || (input_ended_ && stream_ != nullptr);
      });
      if (!failure_.ok()) return failure_;
      drop_sequences = std::exchange(stream_changed_, false);
      if (!plans_.empty()) {
        executing_ = true;
        sink = stream_;
        plan = std::move(plans_.front());
        plans_.pop_front();
      } else if (input_ended_ && stream_ != nullptr) {
        finish = drop_sequences = true;
        sink = std::exchange(stream_, nullptr);
      }
      if (drop_sequences) num_sequences_ = 0;
    }
    if (drop_sequences) {
      engine.Reset();
      std::fill(started_.begin(), started_.end(), false);
      metrics_->sequences.Set(0);
    }
    if (finish) {
      sink->Finish(absl::OkStatus());
    } else if (sink != nullptr) {
      const absl::Status status = ExecutePlan(engine, plan, *sink);
      if (status.ok()) continue;
      metrics_->CountFailedStep(status.code());
      LogWarn("step failed epoch={} rank={} step={} status=\"{}\"", epoch(), options_.rank, plan.step(),
              status.ToString());
      // A plan that breaks the rules harms its stream alone. Anything else has left the ranks in different places: the
      // group fails, and only then (Abort) does its stream hear of it, so that nobody finds the group still serving.
      if (status.code() != absl::StatusCode::kInvalidArgument) return status;
      DropStream(sink.get());
      sink->Finish(status);
    }
  }
}

absl::Status Group::ExecutePlan(Engine& engine, const v1::StepPlan& plan, ResultSink& sink) {
  v1::StepResult result;
  const auto start = Clock::now();
  NIBBLE_RETURN_IF_ERROR(engine.Execute(plan, &result));
  metrics_->CountStep(plan, result, SecondsSince(start));
  CountSequences(plan);
  // False: the stream is being dropped by the thread that closed it.
  static_cast<void>(sink.Write(std::move(result)));
  return absl::OkStatus();
}

// The engine accepted the plan, so its slots are in range.
void Group::CountSequences(const v1::StepPlan& plan) {
  if (plan.release_slots().empty() && plan.start().empty()) return;
  for (const uint32_t slot : plan.release_slots()) started_[slot] = false;
  for (const auto& start : plan.start()) started_[start.slot()] = true;
  const int64_t count = std::count(started_.begin(), started_.end(), true);
  metrics_->sequences.Set(static_cast<double>(count));
  std::lock_guard lock(mutex_);
  if (stream_ != nullptr && !stream_changed_) num_sequences_ = count;
}

}  // namespace nibble
