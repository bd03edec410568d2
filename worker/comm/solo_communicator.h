// The group of one rank: every collective is the identity.
#pragma once

#include <memory>

#include "worker/comm/communicator.h"

namespace nibble {

std::unique_ptr<PendingCommunicator> PrepareSoloCommunicator();

}  // namespace nibble
