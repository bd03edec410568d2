// `nibble chat`: a conversation, line by line. Works in a pipe too: every line of stdin is one message.
#pragma once

#include <optional>
#include <string>

#include "nibble/v1/inference.grpc.pb.h"
#include "tools/cli/console.h"
#include "tools/client/interrupt.h"

namespace CLI {
class App;
}

namespace nibble {

struct ChatFlags {
  v1::GenerateRequest request;  // sampling flags write straight into it
  std::string system;
  std::optional<double> deadline_s;
};
void AddChatFlags(CLI::App* app, ChatFlags* flags);

// Runs until end of input or /quit. A model without chat template continues the text of the whole conversation instead.
// A failed answer leaves the conversation as it was before the message; in a pipe it ends the chat with its exit code.
int ChatCommand(v1::Inference::StubInterface* stub, ChatFlags flags, const Console& console, Interrupt* interrupt);

}  // namespace nibble
