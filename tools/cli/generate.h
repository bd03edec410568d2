// `nibble generate`: one prompt in, its continuation out as it comes.
#pragma once

#include <optional>
#include <string>

#include "nibble/v1/inference.grpc.pb.h"
#include "tools/cli/console.h"
#include "tools/cli/request_flags.h"
#include "tools/client/interrupt.h"

namespace CLI {
class App;
}

namespace nibble {

struct GenerateFlags {
  PromptFlags prompt;
  v1::GenerateRequest request;  // sampling and request flags write straight into it
  std::optional<double> deadline_s;
  bool json = false;
  bool echo = false;
  bool quiet = false;
};
void AddGenerateFlags(CLI::App* app, GenerateFlags* flags);

// Prints text (or, with --json, one object) to console.out and a summary or an error to console.err. Returns the exit
// code (tools/client/rpc_error.h). interrupt may be null.
int GenerateCommand(v1::Inference::StubInterface* stub, GenerateFlags flags, const Console& console,
                    Interrupt* interrupt);

}  // namespace nibble
