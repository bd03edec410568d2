#include "router/fleet.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "router/output.h"
#include "router/placement.h"

namespace nibble {
namespace {

constexpr std::chrono::milliseconds kRetryAfter{1000};

uint64_t PromptTokens(const std::vector<std::unique_ptr<Sequence>>& sequences) {
  uint64_t tokens = 0;
  for (const auto& sequence : sequences) tokens += sequence->num_prompt_tokens;
  return tokens;
}

}  // namespace

Fleet::Fleet(const FleetOptions& options, std::vector<Workers> replicas, ExpectedModel expected, OutputPool* output,
             MetricRegistry* metrics, std::function<void(bool)> on_ready)
    : options_(options),
      agreement_(std::move(expected)),
      output_(output),
      on_ready_(std::move(on_ready)),
      prefixes_(static_cast<uint32_t>(replicas.size())),
      replay_([this](std::unique_ptr<Sequence> s, TimePoint until) { Replay(std::move(s), until); },
              [this](std::unique_ptr<Sequence> s) { s->output->Fail(WithoutReplica(*s)); }) {
  for (uint32_t i = 0; i < replicas.size(); ++i) {
    metrics_.push_back(std::make_unique<ReplicaMetrics>(metrics, options_.model_name, i));
    ReplicaOptions replica = options_.replica;
    replica.index = i;
    replicas_.push_back(std::make_unique<Replica>(replica, std::move(replicas[i].addresses), replicas[i].channels,
                                                  &agreement_, static_cast<ReplicaObserver*>(this),
                                                  metrics_[i].get()));
  }
}

Fleet::~Fleet() { Stop(); }

void Fleet::Start() {
  for (auto& replica : replicas_) replica->Start();
}

void Fleet::Stop() {
  stopping_ = true;
  for (auto& replica : replicas_) replica->Stop();
  replay_.Stop();
}

absl::Status Fleet::NoReplica() const {
  if (stopping_) return WithRetryAfter(absl::UnavailableError("the router is stopping"), kRetryAfter);
  return WithRetryAfter(
      absl::UnavailableError(absl::StrCat("no replica is ready (", replicas_.size(), " configured)")), kRetryAfter);
}

absl::Status Fleet::WithoutReplica(const Sequence& sequence) const {
  if (stopping_ || sequence.first_scheduled_at == TimePoint{}) return NoReplica();
  return WithRetryAfter(absl::UnavailableError("the replica of this request was lost and no other is ready"),
                        kRetryAfter);
}

absl::Status Fleet::Submit(Sequences sequences) {
  const bool may_wait = options_.replay_wait.count() > 0;
  if (stopping_ || (!ready() && !may_wait)) return NoReplica();
  // Under the lock until the replica counts them: of two requests, the second sees the first.
  std::lock_guard<std::mutex> lock(submit_mutex_);
  NIBBLE_RETURN_IF_ERROR(CheckQueues(sequences.size(), PromptTokens(sequences)));
  const uint64_t arrival = ++arrivals_;
  for (auto& sequence : sequences) sequence->arrival = arrival;
  Place(&sequences);
  // When a replica went down between two of them, some have a home and some have not: the stream fails as a whole, unless
  // the others may wait.
  if (!sequences.empty() && !may_wait) return NoReplica();
  const TimePoint until = Clock::now() + options_.replay_wait;
  for (auto& sequence : sequences) replay_.Park(std::move(sequence), until);
  return absl::OkStatus();
}

absl::Status Fleet::CheckQueues(size_t sequences, uint64_t tokens) {
  const ReplayQueue::Load parked = replay_.load();
  uint64_t waiting = parked.sequences, waiting_tokens = parked.prompt_tokens;
  for (const auto& replica : replicas_) {
    const Replica::Queue queue = replica->queue();
    waiting += queue.sequences;
    waiting_tokens += queue.prompt_tokens;
  }
  if (waiting + sequences > options_.max_waiting_requests) {
    return WithRetryAfter(
        absl::ResourceExhaustedError(absl::StrCat("too many requests: ", waiting, " wait, ", sequences,
                                                  " more would exceed ", options_.max_waiting_requests,
                                                  " (max-waiting-requests)")),
        kRetryAfter);
  }
  if (waiting_tokens + tokens > options_.max_waiting_tokens) {
    return WithRetryAfter(
        absl::ResourceExhaustedError(absl::StrCat("too many prompt tokens: ", waiting_tokens, " wait, ", tokens,
                                                  " more would exceed ", options_.max_waiting_tokens,
                                                  " (max-waiting-tokens)")),
        kRetryAfter);
  }
  return absl::OkStatus();
}

void Fleet::Place(Sequences* sequences) {
  const Sequence& first = *sequences->front();
  const uint32_t page_tokens = options_.replica.scheduler.page_tokens;
  std::vector<uint64_t> chain;
  std::vector<ReplicaSnapshot> snapshots;
  for (const auto& replica : replicas_) snapshots.push_back(replica->snapshot());
  if (replicas_.size() > 1 && first.use_prefix_cache && options_.replica.scheduler.prefix_cache) {
    chain = PrefixChain(first.token_ids, first.cache_salt, page_tokens);
    const std::vector<uint32_t> pages = prefixes_.MatchedPages(chain);
    for (size_t i = 0; i < pages.size(); ++i) snapshots[i].cached_prefix_tokens = pages[i] * page_tokens;
  }
  const PlacementRequest request{.num_prompt_tokens = static_cast<uint32_t>(first.token_ids.size()),
                                 .num_sequences = static_cast<uint32_t>(sequences->size()),
                                 .page_tokens = page_tokens};
  size_t next = 0;
  while (next < sequences->size()) {
    const absl::StatusOr<uint32_t> picked = PickReplica(snapshots, request);
    if (!picked.ok()) break;
    while (next < sequences->size() && replicas_[*picked]->Add(&(*sequences)[next])) ++next;
    if (next > 0) prefixes_.Placed(*picked, chain);
    snapshots[*picked].ready = false;
  }
  sequences->erase(sequences->begin(), sequences->begin() + static_cast<std::ptrdiff_t>(next));
}

void Fleet::Cancel(uint64_t sequence_id) {
  for (auto& replica : replicas_) replica->Cancel(sequence_id);
}

void Fleet::OnSequencesLost(uint32_t replica, Sequences lost, const absl::Status& why) {
  LogWarn("sequences lost replica={} count={} ready_replicas={}", replica, lost.size(), num_ready_.load());
  const TimePoint until = Clock::now() + options_.replay_wait;
  for (auto& sequence : lost) {
    if (SequenceCancelled(*sequence)) continue;
    const bool ran = sequence->first_scheduled_at != TimePoint{};
    if (stopping_) {
      sequence->output->Fail(NoReplica());
    } else if (ran && ++sequence->replays > options_.max_replays) {
      sequence->output->Fail(WithRetryAfter(
          absl::UnavailableError(
              absl::StrCat("lost its replica ", sequence->replays, " times, the limit is ", options_.max_replays)),
          kRetryAfter));
    } else {
      Replay(std::move(sequence), until);
    }
  }
}

void Fleet::Replay(std::unique_ptr<Sequence> sequence, TimePoint until) {
  Sequences one;
  one.push_back(std::move(sequence));
  Place(&one);
  if (one.empty()) return;
  if (!stopping_ && until > Clock::now()) {
    replay_.Park(std::move(one[0]), until);
  } else {
    one[0]->output->Fail(WithoutReplica(*one[0]));
  }
}

void Fleet::OnReadyChanged(uint32_t replica, bool ready) {
  std::lock_guard<std::mutex> lock(ready_mutex_);
  prefixes_.Reset(replica, ready ? replicas_[replica]->snapshot().total_pages : 0);
  const int before = num_ready_.fetch_add(ready ? 1 : -1);
  if (ready) replay_.Wake();
  if (before == 0 || (before == 1 && !ready)) on_ready_(ready);
}

void Fleet::OnEvents(std::vector<SequenceEvent>* events) { output_->Deliver(events); }

std::vector<ReplicaReport> Fleet::Reports() const {
  std::vector<ReplicaReport> reports;
  for (const auto& replica : replicas_) reports.push_back(replica->report());
  return reports;
}

}  // namespace nibble
