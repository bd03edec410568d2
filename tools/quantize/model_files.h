// The files beside config and tensors that make a model directory usable.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "common/model/writer.h"

namespace nibble {

// Copies the tokenizer's, generation config's and chat template's files, those that `from` has.
absl::Status CopyModelFiles(const std::string& from, ModelWriter* writer);

}  // namespace nibble
