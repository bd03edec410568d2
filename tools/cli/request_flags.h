// Flags of `nibble generate` and `nibble chat` that become fields of GenerateRequest. Ranges are the server's to check:
// its errors name field, value and limit, and stay right when the limits change.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "nibble/v1/inference.pb.h"
#include "tools/cli/console.h"

namespace CLI {
class App;
}

namespace nibble {

inline constexpr size_t kMaxPromptBytes = 16 << 20;

// Every flag that was given sets its field of *request; the others leave it alone.
void AddSamplingFlags(CLI::App* app, v1::GenerateRequest* request);

struct PromptFlags {
  std::string text;    // --prompt or the positional argument
  std::string file;    // --prompt-file, "-" = stdin
  std::string ids;     // --token-ids "1,2,3"
  std::string system;  // --system, with --chat
  bool text_given = false;
  bool chat = false;  // --chat: the prompt is a user's message
};
void AddPromptFlags(CLI::App* app, PromptFlags* flags);

// Sets request->input. Without any flag the prompt is read from a stdin that is no terminal. INVALID_ARGUMENT for no
// prompt, two prompts, text that is not UTF-8, ids that are no numbers.
absl::Status SetInput(const PromptFlags& flags, const Console& console, v1::GenerateRequest* request);

}  // namespace nibble
