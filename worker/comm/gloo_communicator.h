// Collectives over TCP between CPU ranks, on one machine or several.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/comm/communicator.h"

namespace nibble {

// options as PrepareCommunicator checked them, size ≥ 2.
absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareGlooCommunicator(const CommunicatorOptions& options);

}  // namespace nibble
