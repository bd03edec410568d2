#include "worker/comm/communicator.h"

#include "absl/strings/str_cat.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/comm/solo_communicator.h"

namespace nibble {

absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(const CommunicatorOptions& options) {
  if (options.size < 1 || options.size > kMaxRanks) {
    return absl::InvalidArgumentError(absl::StrCat("size is ", options.size, ", must be in 1..", kMaxRanks));
  }
  if (options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(absl::StrCat("rank is ", options.rank, ", must be in 0..", options.size - 1));
  }
  if (options.timeout < std::chrono::milliseconds(1) || options.timeout > kMaxCollectiveTimeout) {
    return absl::InvalidArgumentError(absl::StrCat("timeout is ", options.timeout.count(), " ms, must be in 1..",
                                                   kMaxCollectiveTimeout.count(), " ms"));
  }
  if (options.size == 1) return PrepareSoloCommunicator();
  return PrepareGlooCommunicator(options);
}

}  // namespace nibble
