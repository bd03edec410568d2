// `nibble status`: is the service ready, and what is it doing?
#pragma once

#include <optional>

#include "nibble/v1/inference.grpc.pb.h"
#include "tools/cli/console.h"
#include "tools/client/interrupt.h"

namespace CLI {
class App;
}

namespace nibble {

struct StatusFlags {
  std::optional<double> wait_s;  // wait until a replica is ready (all of them with --all), at most this long
  bool all = false;
  bool json = false;
  bool watch = false;
  double interval_s = 1;
};
void AddStatusFlags(CLI::App* app, StatusFlags* flags);

// Exit code 0 when a replica is ready (with --all: every one), kExitTryAgain when none is: a probe needs no more.
int StatusCommand(v1::Inference::StubInterface* stub, const StatusFlags& flags, const Console& console,
                  Interrupt* interrupt);

}  // namespace nibble
