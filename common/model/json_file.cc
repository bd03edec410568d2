#include "common/model/json_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace nibble {
namespace {

// Depth of `text` if it is JSON. A scan of its own, before parsing, because a parser must never be asked to recurse.
int64_t Nesting(std::string_view text) {
  int64_t depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

std::string Quoted(std::string_view text) {
  constexpr size_t kLongest = 120;
  std::string out = absl::Utf8SafeCHexEscape(absl::string_view(text.data(), std::min(text.size(), kLongest)));
  if (text.size() > kLongest) absl::StrAppend(&out, "...");
  return absl::StrCat("\"", out, "\"");
}

absl::Status FileError(int error_number, std::string_view doing, const std::string& path) {
  const std::string message =
      absl::StrCat(absl::string_view(doing.data(), doing.size()), " ", path, ": ", std::strerror(error_number));
  return absl::Status(
      error_number == EFBIG ? absl::StatusCode::kResourceExhausted : absl::ErrnoToStatusCode(error_number), message);
}

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what) {
  const std::string where(what);
  if (const int64_t depth = Nesting(text); depth > kMaxJsonNesting) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": JSON is nested ", depth, " deep, at most ", kMaxJsonNesting, " is read"));
  }
  // One set of keys per open object; duplicates would silently hide a value from us or from another reader.
  std::vector<std::set<std::string>> open_objects;
  std::string duplicate;
  const nlohmann::json::parser_callback_t watch = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    switch (event) {
      case nlohmann::json::parse_event_t::object_start:
        open_objects.emplace_back();
        break;
      case nlohmann::json::parse_event_t::object_end:
        open_objects.pop_back();
        break;
      case nlohmann::json::parse_event_t::key: {
        const std::string& key = value.get_ref<const std::string&>();
        if (!open_objects.back().insert(key).second && duplicate.empty()) duplicate = Quoted(key);
        break;
      }
      default:
        break;
    }
    return true;
  };
  nlohmann::json json = nlohmann::json::parse(text.begin(), text.end(), watch, /*allow_exceptions=*/false);
  if (json.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(where, ": not valid JSON"));
  if (!duplicate.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": key ", duplicate, " occurs twice in one object"));
  }
  return json;
}

absl::StatusOr<nlohmann::json> ReadJsonObject(const std::string& path, int64_t max_bytes) {
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, max_bytes));
  NIBBLE_ASSIGN_OR_RETURN(nlohmann::json json, ParseJson(text, path));
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": the top level is not an object"));
  return json;
}

}  // namespace nibble
