#include "common/text/tokenizer_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/base/status.h"
#include "common/text/utf8.h"
#include "common/text/vocabulary.h"

namespace nibble {
namespace {

using Json = nlohmann::json;

constexpr int kMaxNesting = 64;
constexpr size_t kMaxStages = 16;

absl::Status Invalid(std::string_view field, std::string_view problem) {
  return absl::InvalidArgumentError(fmt::format("{} {}", field, problem));
}
absl::Status Unsupported(std::string_view field, std::string_view value) {
  return absl::UnimplementedError(fmt::format("{} {} is not supported", field, value));
}

// Checked before parsing, so that no later walk over the document can be deep.
bool NestsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxNesting) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// Not a StatusOr<Json>: a Json can be made of anything, also of a Status.
absl::Status ParseObject(std::string_view text, Json* root) {
  if (static_cast<int64_t>(text.size()) > kMaxTokenizerFileBytes)
    return absl::InvalidArgumentError(
        fmt::format("file has {} bytes, must be at most {}", text.size(), kMaxTokenizerFileBytes));
  if (NestsTooDeep(text)) return absl::InvalidArgumentError(fmt::format("JSON nests deeper than {}", kMaxNesting));
  *root = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!root->is_object()) return absl::InvalidArgumentError("not a JSON object");
  return absl::OkStatus();
}

// The member `key`, or null when absent or null: the format writes both for "none".
const Json& Member(const Json& object, const char* key) {
  static const Json kNull;
  const auto it = object.find(key);
  return it == object.end() ? kNull : *it;
}

absl::StatusOr<bool> Bool(const Json& object, const char* key, bool default_value, std::string_view where) {
  const Json& value = Member(object, key);
  if (value.is_null()) return default_value;
  if (!value.is_boolean()) return Invalid(fmt::format("{}.{}", where, key), "must be true or false");
  return value.get<bool>();
}

absl::StatusOr<std::string> String(const Json& object, const char* key, std::string_view where) {
  const Json& value = Member(object, key);
  if (!value.is_string()) return Invalid(fmt::format("{}.{}", where, key), "must be a string");
  return value.get<std::string>();
}

absl::StatusOr<uint32_t> TokenId(const Json& value, std::string_view where) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > kMaxTokenId)
    return Invalid(where, fmt::format("must be a token id from 0 to {}", kMaxTokenId));
  return value.get<uint32_t>();
}

// {"type": ..., ...}
absl::StatusOr<std::string> Type(const Json& value, std::string_view where) {
  if (!value.is_object()) return Invalid(where, "must be an object with a type");
  return String(value, "type", where);
}

// The array `key` of a Sequence.
absl::StatusOr<const Json*> Elements(const Json& sequence, const char* key, std::string_view where) {
  const Json& elements = Member(sequence, key);
  if (!elements.is_array() || elements.size() > kMaxStages)
    return Invalid(fmt::format("{}.{}", where, key), fmt::format("must be an array of at most {}", kMaxStages));
  return &elements;
}

absl::Status ParseModel(const Json& model, TokenizerDefinition* definition) {
  if (!model.is_object()) return Invalid("model", "must be an object");
  if (!Member(model, "type").is_null()) {  // files from before 2020 have no type
    NIBBLE_ASSIGN_OR_RETURN(const std::string type, Type(model, "model"));
    if (type != "BPE") return Unsupported("model.type", type);
  }
  // Announces a vocabulary of characters instead of bytes. (unk_token and fuse_unk need no look: every byte has a
  // token, which BytePairEncoder checks, so nothing is ever unknown.)
  NIBBLE_ASSIGN_OR_RETURN(const bool byte_fallback, Bool(model, "byte_fallback", false, "model"));
  if (byte_fallback) return Unsupported("model.byte_fallback", "true");
  const Json& dropout = Member(model, "dropout");
  if (!dropout.is_null() && dropout != 0.0) return Unsupported("model.dropout", "other than null");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& affix = Member(model, key);
    if (!affix.is_null() && affix != "") return Unsupported(fmt::format("model.{}", key), "other than null");
  }
  NIBBLE_ASSIGN_OR_RETURN(definition->ignore_merges, Bool(model, "ignore_merges", false, "model"));

  const Json& vocab = Member(model, "vocab");
  if (!vocab.is_object() || vocab.empty()) return Invalid("model.vocab", "must be an object of token ids, not empty");
  definition->vocab.reserve(vocab.size());
  for (const auto& [spelling, value] : vocab.items()) {
    if (spelling.empty()) return Invalid("model.vocab", "has an empty token");
    NIBBLE_ASSIGN_OR_RETURN(const uint32_t id, TokenId(value, fmt::format("model.vocab[\"{}\"]", Excerpt(spelling))));
    definition->vocab.emplace_back(spelling, id);
  }

  const Json& merges = Member(model, "merges");
  if (!merges.is_array()) return Invalid("model.merges", "must be an array");
  definition->merges.reserve(merges.size());
  for (const Json& merge : merges) {
    const auto where = [&] { return fmt::format("model.merges[{}]", definition->merges.size()); };
    if (merge.is_array()) {
      if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string())
        return Invalid(where(), "must be two tokens");
      definition->merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else if (merge.is_string()) {  // the older form "a b"
      const std::string& line = merge.get_ref<const std::string&>();
      if (line.starts_with("#version")) continue;
      const size_t space = line.find(' ');
      if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
        return Invalid(where(), "must be two tokens separated by one space");
      definition->merges.emplace_back(line.substr(0, space), line.substr(space + 1));
    } else {
      return Invalid(where(), "must be a string or an array of two");
    }
  }
  return absl::OkStatus();
}

absl::Status ParseAddedTokens(const Json& tokens, TokenizerDefinition* definition) {
  if (tokens.is_null()) return absl::OkStatus();
  if (!tokens.is_array()) return Invalid("added_tokens", "must be an array");
  for (const Json& element : tokens) {
    const std::string where = fmt::format("added_tokens[{}]", definition->added_tokens.size());
    if (!element.is_object()) return Invalid(where, "must be an object");
    AddedToken token;
    NIBBLE_ASSIGN_OR_RETURN(token.content, String(element, "content", where));
    if (token.content.empty() || token.content.size() > kMaxAddedTokenBytes)
      return Invalid(fmt::format("{}.content", where), fmt::format("must have 1..{} bytes", kMaxAddedTokenBytes));
    NIBBLE_ASSIGN_OR_RETURN(token.id, TokenId(Member(element, "id"), fmt::format("{}.id", where)));
    NIBBLE_ASSIGN_OR_RETURN(token.special, Bool(element, "special", false, where));
    NIBBLE_ASSIGN_OR_RETURN(token.normalized, Bool(element, "normalized", !token.special, where));
    NIBBLE_ASSIGN_OR_RETURN(token.lstrip, Bool(element, "lstrip", false, where));
    NIBBLE_ASSIGN_OR_RETURN(token.rstrip, Bool(element, "rstrip", false, where));
    NIBBLE_ASSIGN_OR_RETURN(const bool single_word, Bool(element, "single_word", false, where));
    if (single_word) return Unsupported(fmt::format("{}.single_word", where), "true");
    definition->added_tokens.push_back(std::move(token));
  }
  return absl::OkStatus();
}

absl::Status ParseNormalizer(const Json& normalizer, std::string_view where, TokenizerDefinition* definition) {
  if (normalizer.is_null()) return absl::OkStatus();
  NIBBLE_ASSIGN_OR_RETURN(const std::string type, Type(normalizer, where));
  if (type == "NFC") {
    definition->nfc = true;
    return absl::OkStatus();
  }
  if (type != "Sequence") return Unsupported(where, type);
  NIBBLE_ASSIGN_OR_RETURN(const Json* elements, Elements(normalizer, "normalizers", where));
  for (const Json& element : *elements)
    NIBBLE_RETURN_IF_ERROR(ParseNormalizer(element, "normalizer.normalizers", definition));
  return absl::OkStatus();
}

absl::StatusOr<SplitStage> ParseSplit(const Json& split, std::string_view where) {
  SplitStage stage;
  const Json& pattern = Member(split, "pattern");
  if (!pattern.is_object() || pattern.size() != 1)
    return Invalid(fmt::format("{}.pattern", where), "must hold one Regex or String");
  const std::string& kind = pattern.begin().key();
  if ((kind != "Regex" && kind != "String") || !pattern.begin()->is_string() ||
      pattern.begin()->get_ref<const std::string&>().empty())
    return Invalid(fmt::format("{}.pattern", where), "must hold one Regex or String, not empty");
  stage.pattern = pattern.begin()->get<std::string>();
  if (kind == "String") stage.pattern = QuotePattern(stage.pattern);

  NIBBLE_ASSIGN_OR_RETURN(const std::string behavior, String(split, "behavior", where));
  NIBBLE_ASSIGN_OR_RETURN(const bool invert, Bool(split, "invert", false, where));
  if (behavior == "Removed") {
    (invert ? stage.keep_gaps : stage.keep_matches) = false;
  } else if (behavior != "Isolated") {
    return Unsupported(fmt::format("{}.behavior", where), behavior);
  }
  return stage;
}

absl::Status ParsePreTokenizer(const Json& pre_tokenizer, TokenizerDefinition* definition) {
  if (pre_tokenizer.is_null()) return Unsupported("pre_tokenizer", "null");
  NIBBLE_ASSIGN_OR_RETURN(const std::string outer_type, Type(pre_tokenizer, "pre_tokenizer"));
  std::vector<const Json*> elements = {&pre_tokenizer};
  if (outer_type == "Sequence") {
    NIBBLE_ASSIGN_OR_RETURN(const Json* array, Elements(pre_tokenizer, "pretokenizers", "pre_tokenizer"));
    elements.clear();
    for (const Json& element : *array) elements.push_back(&element);
  }
  bool byte_level = false;
  for (const Json* element : elements) {
    const std::string where = outer_type == "Sequence"
                                  ? fmt::format("pre_tokenizer.pretokenizers[{}]", definition->stages.size())
                                  : std::string("pre_tokenizer");
    NIBBLE_ASSIGN_OR_RETURN(const std::string type, Type(*element, where));
    // Behind ByteLevel, patterns would see the spelling of bytes instead of the text.
    if (byte_level) return Unsupported(where, fmt::format("{} behind ByteLevel", type));
    SplitStage stage;
    if (type == "ByteLevel") {
      byte_level = true;
      NIBBLE_ASSIGN_OR_RETURN(stage.prefix_space, Bool(*element, "add_prefix_space", true, where));
      NIBBLE_ASSIGN_OR_RETURN(const bool use_regex, Bool(*element, "use_regex", true, where));
      if (use_regex) stage.pattern = kGpt2Pattern;
    } else if (type == "Split") {
      NIBBLE_ASSIGN_OR_RETURN(stage, ParseSplit(*element, where));
    } else if (type == "Digits") {
      NIBBLE_ASSIGN_OR_RETURN(const bool individual, Bool(*element, "individual_digits", false, where));
      stage.pattern = individual ? "\\p{N}" : "\\p{N}+";
    } else {
      return Unsupported(where, type);
    }
    definition->stages.push_back(std::move(stage));
  }
  if (!byte_level) return Unsupported("pre_tokenizer", "without ByteLevel");
  return absl::OkStatus();
}

absl::Status ParseTemplate(const Json& processor, std::string_view where, TokenizerDefinition* definition) {
  const Json& single = Member(processor, "single");
  const Json& special_tokens = Member(processor, "special_tokens");
  if (!single.is_array() || single.size() > kMaxStages)
    return Invalid(fmt::format("{}.single", where), fmt::format("must be an array of at most {}", kMaxStages));
  bool behind_text = false;
  for (const Json& piece : single) {
    if (!piece.is_object()) return Invalid(fmt::format("{}.single", where), "must hold Sequence and SpecialToken");
    const Json& token = Member(piece, "SpecialToken");
    const Json& sequence = Member(piece, "Sequence");
    if (sequence.is_object()) {
      if (behind_text || Member(sequence, "id") != "A")
        return Invalid(fmt::format("{}.single", where), "must contain Sequence A once");
      behind_text = true;
      continue;
    }
    if (!token.is_object()) return Invalid(fmt::format("{}.single", where), "must hold Sequence and SpecialToken");
    NIBBLE_ASSIGN_OR_RETURN(const std::string name, String(token, "id", fmt::format("{}.single.SpecialToken", where)));
    const Json& special = special_tokens.is_object() ? Member(special_tokens, name.c_str()) : special_tokens;
    const Json& ids = special.is_object() ? Member(special, "ids") : special;
    if (!ids.is_array() || ids.empty() || ids.size() > kMaxStages)
      return Invalid(fmt::format("{}.special_tokens", where),
                     fmt::format("must give \"{}\" 1..{} ids", Excerpt(name), kMaxStages));
    for (const Json& value : ids) {
      NIBBLE_ASSIGN_OR_RETURN(const uint32_t id, TokenId(value, fmt::format("{}.special_tokens ids", where)));
      (behind_text ? definition->suffix_ids : definition->prefix_ids).push_back(id);
    }
  }
  if (!behind_text) return Invalid(fmt::format("{}.single", where), "must contain Sequence A once");
  return absl::OkStatus();
}

absl::Status ParsePostProcessor(const Json& post_processor, TokenizerDefinition* definition) {
  if (post_processor.is_null()) return absl::OkStatus();
  NIBBLE_ASSIGN_OR_RETURN(const std::string outer_type, Type(post_processor, "post_processor"));
  std::vector<const Json*> elements = {&post_processor};
  if (outer_type == "Sequence") {
    NIBBLE_ASSIGN_OR_RETURN(const Json* array, Elements(post_processor, "processors", "post_processor"));
    elements.clear();
    for (const Json& element : *array) elements.push_back(&element);
  }
  bool has_template = false;
  for (const Json* element : elements) {
    NIBBLE_ASSIGN_OR_RETURN(const std::string type, Type(*element, "post_processor"));
    if (type == "ByteLevel") continue;  // adjusts offsets, never ids
    if (type != "TemplateProcessing") return Unsupported("post_processor", type);
    if (has_template) return Unsupported("post_processor", "with two templates");
    has_template = true;
    NIBBLE_RETURN_IF_ERROR(ParseTemplate(*element, "post_processor", definition));
  }
  return absl::OkStatus();
}

absl::Status ParseDecoder(const Json& decoder) {
  if (decoder.is_null()) return Unsupported("decoder", "null");
  NIBBLE_ASSIGN_OR_RETURN(const std::string type, Type(decoder, "decoder"));
  if (type != "ByteLevel") return Unsupported("decoder", type);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenizerDefinition> ParseTokenizerJson(std::string_view text) {
  Json root;
  NIBBLE_RETURN_IF_ERROR(ParseObject(text, &root));
  TokenizerDefinition definition;
  for (const char* key : {"truncation", "padding"})
    if (!Member(root, key).is_null()) return Unsupported(key, "other than null");
  NIBBLE_RETURN_IF_ERROR(ParseNormalizer(Member(root, "normalizer"), "normalizer", &definition));
  NIBBLE_RETURN_IF_ERROR(ParsePreTokenizer(Member(root, "pre_tokenizer"), &definition));
  NIBBLE_RETURN_IF_ERROR(ParsePostProcessor(Member(root, "post_processor"), &definition));
  NIBBLE_RETURN_IF_ERROR(ParseDecoder(Member(root, "decoder")));
  NIBBLE_RETURN_IF_ERROR(ParseAddedTokens(Member(root, "added_tokens"), &definition));
  NIBBLE_RETURN_IF_ERROR(ParseModel(Member(root, "model"), &definition));
  return definition;
}

absl::StatusOr<std::string> ParseBosToken(std::string_view tokenizer_config) {
  Json root;
  NIBBLE_RETURN_IF_ERROR(ParseObject(tokenizer_config, &root));
  const Json& token = Member(root, "bos_token");
  if (token.is_null()) return std::string();
  if (token.is_object()) return String(token, "content", "bos_token");
  return String(root, "bos_token", "tokenizer_config");
}

}  // namespace nibble
