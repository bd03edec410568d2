#include "tools/quantize/model_files.h"

#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace nibble {

absl::Status CopyModelFiles(const std::string& from, ModelWriter* writer) {
  constexpr const char* kNames[] = {"tokenizer.json",         "tokenizer_config.json", "special_tokens_map.json",
                                    "generation_config.json", "chat_template.jinja",   "added_tokens.json"};
  constexpr int64_t kMaxBytes = int64_t{256} << 20;
  for (const char* name : kNames) {
    const absl::StatusOr<std::string> contents = ReadSmallFile(from + "/" + name, kMaxBytes);
    if (absl::IsNotFound(contents.status())) continue;
    NIBBLE_RETURN_IF_ERROR(contents.status());
    NIBBLE_RETURN_IF_ERROR(writer->WriteFile(name, *contents));
  }
  return absl::OkStatus();
}

}  // namespace nibble
