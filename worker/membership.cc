#include "worker/membership.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "common/base/log.h"
#include "common/base/version.h"

namespace nibble {
namespace {

// Bounds on what a router may ask for, far above what any does: a slot or a row costs memory before the first plan.
constexpr uint32_t kMaxSequences = 65536;
constexpr uint32_t kMaxStepTokens = 1 << 20;

uint64_t RandomInstance() {
  std::random_device random;
  return (static_cast<uint64_t>(random()) << 32 | random()) | 1;
}

absl::Status CheckRank(const v1::PrepareRequest& request, uint32_t num_kv_heads) {
  if (request.world_size() < 1 || request.world_size() > kMaxRanks) {
    return absl::InvalidArgumentError(
        fmt::format("world_size is {}, must be in 1..{}", request.world_size(), kMaxRanks));
  }
  if (request.rank() >= request.world_size()) {
    return absl::InvalidArgumentError(
        fmt::format("rank is {}, must be below world_size {}", request.rank(), request.world_size()));
  }
  if (num_kv_heads % request.world_size() != 0) {
    return absl::InvalidArgumentError(
        fmt::format("world_size is {}, must divide the model's {} KV heads", request.world_size(), num_kv_heads));
  }
  return absl::OkStatus();
}

absl::Status CheckLimit(const char* field, uint32_t value, uint32_t limit) {
  if (value >= 1 && value <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{} is {}, must be in 1..{}", field, value, limit));
}

}  // namespace

Membership::Membership(Backend* backend, WorkerMetrics* metrics, int64_t kv_memory_bytes)
    : backend_(backend),
      metrics_(metrics),
      kv_memory_bytes_(kv_memory_bytes),
      model_(backend->model()),
      instance_(RandomInstance()) {}

Membership::~Membership() {
  const absl::Status stopping = absl::UnavailableError("the worker is stopping");
  if (current_ != nullptr) current_->Abort(stopping);
  for (const auto& group : retired_) group->Abort(stopping);
}

absl::StatusOr<v1::WorkerInfo> Membership::GetInfo(const v1::GetInfoRequest& request) const {
  if (request.protocol_version() != v1::PROTOCOL_VERSION_CURRENT) {
    return absl::FailedPreconditionError(
        fmt::format("protocol_version is {}, this worker ({}) speaks {}: router and worker must be of one release",
                    request.protocol_version(), kVersion, static_cast<int>(v1::PROTOCOL_VERSION_CURRENT)));
  }
  v1::WorkerInfo info;
  info.set_protocol_version(v1::PROTOCOL_VERSION_CURRENT);
  info.set_build_version(kVersion);
  info.set_backend(backend_->name());
  info.set_device(backend_->device());
  *info.mutable_model() = model_;
  info.set_instance(instance_);
  std::lock_guard lock(mutex_);
  info.set_draining(draining_);
  return info;
}

void Membership::Prepare(const v1::PrepareRequest& request, Group::PrepareDone done) {
  std::shared_ptr<Group> old;
  absl::Status refused = CheckRank(request, model_.num_kv_heads());
  if (refused.ok()) {
    std::lock_guard lock(mutex_);
    std::erase_if(retired_, [](const auto& group) { return group->ended(); });
    if (draining_) {
      refused = absl::UnavailableError("the worker is draining");
    } else if (request.epoch() <= epoch_) {
      refused = absl::FailedPreconditionError(
          fmt::format("epoch is {}, must be above {}, the newest this worker has seen", request.epoch(), epoch_));
    } else if (retired_.size() >= kMaxRetired) {
      refused = absl::ResourceExhaustedError(fmt::format(
          "groups: {} superseded ones are still loading or meeting, the limit is {}", retired_.size(), kMaxRetired));
    } else {
      epoch_ = request.epoch();
      metrics_->epoch.Set(static_cast<double>(epoch_));
      metrics_->groups.Increment();
      old = std::exchange(current_, nullptr);
      if (old != nullptr) retired_.push_back(old);
      const GroupOptions options{.epoch = request.epoch(),
                                 .rank = static_cast<int>(request.rank()),
                                 .world_size = static_cast<int>(request.world_size()),
                                 .kv_memory_bytes = kv_memory_bytes_};
      current_ = std::make_shared<Group>(options, backend_, &slot_, metrics_, std::move(done));
    }
  }
  if (!refused.ok()) return done(refused);
  if (old != nullptr) old->Abort(absl::AbortedError(fmt::format("epoch {} took over", request.epoch())));
}

void Membership::Join(const v1::JoinRequest& request, Group::JoinDone done) {
  absl::StatusOr<std::shared_ptr<Group>> group = GroupOf(request.epoch());
  if (!group.ok()) return done(group.status());
  absl::Status limits = CheckLimit("max_sequences", request.max_sequences(), kMaxSequences);
  if (limits.ok()) limits = CheckLimit("max_step_tokens", request.max_step_tokens(), kMaxStepTokens);
  if (!limits.ok()) return done(limits);
  (*group)->Join(request, std::move(done));
}

void Membership::Abort(const v1::AbortRequest& request) {
  absl::StatusOr<std::shared_ptr<Group>> group = GroupOf(request.epoch());
  if (!group.ok()) return;
  LogInfo("group aborted epoch={} reason=\"{}\"", request.epoch(), request.reason().substr(0, 300));
  (*group)->Abort(absl::AbortedError(fmt::format("aborted by the router: {}", request.reason().substr(0, 300))));
}

absl::StatusOr<std::shared_ptr<Group>> Membership::GroupOf(uint64_t epoch) const {
  std::lock_guard lock(mutex_);
  if (current_ == nullptr) {
    return absl::FailedPreconditionError(fmt::format("epoch is {}, this worker has prepared none", epoch));
  }
  if (epoch != current_->epoch()) {
    return absl::FailedPreconditionError(fmt::format("epoch is {}, the current one is {}", epoch, current_->epoch()));
  }
  return current_;
}

void Membership::StartDraining() {
  std::lock_guard lock(mutex_);
  draining_ = true;
  metrics_->draining.Set(1);
}

bool Membership::Drain(std::chrono::milliseconds timeout) {
  StartDraining();
  std::shared_ptr<Group> group;
  {
    std::lock_guard lock(mutex_);
    group = current_;
  }
  if (group == nullptr) return true;
  // Polled: once in the life of a process, and the step loop need not know of it.
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!group->idle() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const bool idle = group->idle();
  group->Abort(absl::UnavailableError("the worker is draining"));
  return idle;
}

}  // namespace nibble
