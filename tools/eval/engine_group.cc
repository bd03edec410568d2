#include "tools/eval/engine_group.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace nibble {

absl::StatusOr<std::unique_ptr<EngineGroup>> EngineGroup::Create(const Checkpoint& checkpoint,
                                                                 const EngineGroupOptions& options) {
  const int size = options.world_size;
  if (options.backend != "cpu" && size > 1) {
    return absl::UnimplementedError(
        absl::StrCat("tp is ", size, " on backend ", options.backend, ": collectives work on host memory only"));
  }
  auto group = std::unique_ptr<EngineGroup>(new EngineGroup(size));
  std::vector<std::unique_ptr<PendingCommunicator>> pending(static_cast<size_t>(size));
  std::vector<std::string> endpoints(static_cast<size_t>(size));
  NIBBLE_RETURN_IF_ERROR(group->OnEveryRank([&](int r) -> absl::Status {
    Rank& rank = group->ranks_[static_cast<size_t>(r)];
    NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Ops> ops,
                            CreateOps({.backend = options.backend,
                                       .threads = options.threads_per_rank,
                                       .device = options.device}));
    if (options.wrap_ops) ops = options.wrap_ops(r, std::move(ops));
    rank.ops = std::move(ops);
    NIBBLE_ASSIGN_OR_RETURN(rank.model, LoadModel(checkpoint, rank.ops, r, size));
    NIBBLE_ASSIGN_OR_RETURN(pending[static_cast<size_t>(r)],
                            PrepareCommunicator({.rank = r, .size = size, .timeout = options.collective_timeout}));
    endpoints[static_cast<size_t>(r)] = pending[static_cast<size_t>(r)]->endpoint();
    return absl::OkStatus();
  }));
  NIBBLE_RETURN_IF_ERROR(group->OnEveryRank([&](int r) -> absl::Status {
    Rank& rank = group->ranks_[static_cast<size_t>(r)];
    NIBBLE_ASSIGN_OR_RETURN(rank.communicator, pending[static_cast<size_t>(r)]->Connect(endpoints));
    NIBBLE_ASSIGN_OR_RETURN(rank.engine, CreateEngine(rank.model, rank.communicator, options.limits));
    return absl::OkStatus();
  }));
  return group;
}

int64_t EngineGroup::num_pages() const {
  int64_t pages = ranks_.front().engine->num_pages();
  for (const Rank& rank : ranks_) pages = std::min(pages, rank.engine->num_pages());
  return pages;
}

void EngineGroup::Reset() {
  for (Rank& rank : ranks_) rank.engine->Reset();
}

absl::StatusOr<v1::StepResult> EngineGroup::Execute(const v1::StepPlan& plan) {
  std::vector<v1::StepResult> results(ranks_.size());
  NIBBLE_RETURN_IF_ERROR(OnEveryRank([&](int r) {
    const absl::Status status = ranks_[static_cast<size_t>(r)].engine->Execute(plan, &results[static_cast<size_t>(r)]);
    if (!status.ok()) {
      for (Rank& rank : ranks_) rank.communicator->Abort(status.ToString());
    }
    return status;
  }));
  return std::move(results.front());
}

absl::Status EngineGroup::OnEveryRank(const std::function<absl::Status(int)>& f) {
  std::vector<absl::Status> statuses(ranks_.size());
  {
    std::vector<std::jthread> threads;
    for (size_t r = 1; r < ranks_.size(); ++r) {
      threads.emplace_back([&statuses, &f, r] { statuses[r] = f(static_cast<int>(r)); });
    }
    statuses[0] = f(0);
  }
  const auto cause = std::find_if(statuses.begin(), statuses.end(), [](const absl::Status& s) {
    return !s.ok() && !absl::IsCancelled(s) && !absl::IsUnavailable(s);
  });
  if (cause != statuses.end()) return *cause;
  const auto any = std::find_if(statuses.begin(), statuses.end(), [](const absl::Status& s) { return !s.ok(); });
  return any == statuses.end() ? absl::OkStatus() : *any;
}

}  // namespace nibble
