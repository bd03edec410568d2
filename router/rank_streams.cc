#include "router/rank_streams.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nibble {

RankStreams::RankStreams(const WorkerGroup& group, uint32_t max_steps_in_flight, RankStreamsEvents events,
                         ReplicaMetrics* metrics)
    : events_(std::move(events)), metrics_(metrics), answered_(group.world_size(), 0), plans_(max_steps_in_flight) {
  for (uint32_t rank = 0; rank < group.world_size(); ++rank) {
    streams_.push_back(std::make_unique<WorkerStream>(group.channel(rank), rank, static_cast<WorkerStreamObserver*>(this)));
  }
  sender_ = std::thread(&RankStreams::SendPlans, this);
}

RankStreams::~RankStreams() { Close(); }

void RankStreams::Send(v1::StepPlan plan) {
  [[maybe_unused]] const bool queued = plans_.Push(std::move(plan));  // there is room: a plan in flight has its place
}

void RankStreams::SendPlans() {
  double cpu = ThreadCpuSeconds();
  while (std::optional<v1::StepPlan> plan = plans_.Pop()) {
    grpc::ByteBuffer bytes;
    bool own_buffer = false;
    grpc::SerializationTraits<v1::StepPlan>::Serialize(*plan, &bytes, &own_buffer);
    for (auto& stream : streams_) stream->Send(bytes);
    const double now = ThreadCpuSeconds();
    metrics_->CountSend(now - cpu, bytes.Length());
    cpu = now;
  }
}

std::vector<absl::Status> RankStreams::Close() {
  std::vector<absl::Status> ends;
  if (!sender_.joinable()) return ends;
  plans_.Close();
  sender_.join();
  for (auto& stream : streams_) ends.push_back(stream->Close());
  return ends;
}

uint32_t RankStreams::MissingRank() {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint32_t>(std::min_element(answered_.begin(), answered_.end()) - answered_.begin());
}

void RankStreams::OnResult(uint32_t rank, v1::StepResult result) {
  std::lock_guard<std::mutex> lock(mutex_);  // also while reporting: steps are reported in order
  if (result.step() != answered_[rank] + 1) {
    events_.on_broken(rank, absl::InternalError(absl::StrCat("answered step ", result.step(), ", due was ",
                                                             answered_[rank] + 1)));
    return;
  }
  ++answered_[rank];
  while (forward_us_.size() < answered_[rank] - completed_) forward_us_.push_back(0);
  uint32_t& slowest = forward_us_[answered_[rank] - completed_ - 1];
  slowest = std::max(slowest, result.forward_us());
  if (rank == 0) results_.push_back(std::move(result));
  if (*std::min_element(answered_.begin(), answered_.end()) == completed_) return;
  events_.on_step(std::move(results_.front()), forward_us_.front());
  results_.pop_front();
  forward_us_.pop_front();
  ++completed_;
}

}  // namespace nibble
