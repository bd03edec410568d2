#include "common/text/tokenizer.h"

#include <fmt/format.h>

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/added_tokens.h"
#include "common/text/bpe.h"
#include "common/text/byte_level.h"
#include "common/text/nfc.h"
#include "common/text/pre_tokenizer.h"
#include "common/text/string_map.h"
#include "common/text/tokenizer_json.h"
#include "common/text/utf8.h"
#include "common/text/vocabulary.h"

namespace nibble {

struct Tokenizer::Parts {
  explicit Parts(Vocabulary v) : vocabulary(std::move(v)) {}

  Vocabulary vocabulary;
  std::optional<BytePairEncoder> encoder;  // points at vocabulary
  std::optional<PreTokenizer> pre_tokenizer;
  std::optional<AddedTokenMatcher> added;                  // found first
  std::optional<AddedTokenMatcher> normalized_added;       // found in what the others left over
  StringMap<uint32_t> added_ids;                           // every added token, by content
  absl::flat_hash_map<uint32_t, std::string> added_bytes;  // added tokens that the vocabulary does not have
  bool nfc = false;
  std::vector<uint32_t> prefix_ids;
  std::vector<uint32_t> suffix_ids;
};

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& dir) {
  const std::string path = dir + "/tokenizer.json";
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxTokenizerFileBytes));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = FromJson(text);
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), path);

  const std::string config_path = dir + "/tokenizer_config.json";
  const absl::StatusOr<std::string> config = ReadSmallFile(config_path, kMaxTokenizerFileBytes);
  if (absl::IsNotFound(config.status())) return tokenizer;
  if (!config.ok()) return config.status();
  const absl::StatusOr<std::string> bos_token = ParseBosToken(*config);
  if (!bos_token.ok()) return Annotate(bos_token.status(), config_path);
  // The post-processor decides; the other file only fills in. Qwen2 names no bos_token, GPT-2 one that is not put in
  // front.
  if (!(*tokenizer)->bos_id_ && !bos_token->empty()) (*tokenizer)->bos_id_ = (*tokenizer)->TokenToId(*bos_token);
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view tokenizer_json) {
  NIBBLE_ASSIGN_OR_RETURN(TokenizerDefinition definition, ParseTokenizerJson(tokenizer_json));
  NIBBLE_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Create(definition.vocab));
  auto parts = std::make_unique<Parts>(std::move(vocabulary));
  NIBBLE_ASSIGN_OR_RETURN(parts->encoder,
                          BytePairEncoder::Create(&parts->vocabulary, definition.merges, definition.ignore_merges));
  NIBBLE_ASSIGN_OR_RETURN(parts->pre_tokenizer, PreTokenizer::Create(std::move(definition.stages)));

  // Added tokens either name a token of the vocabulary or add one under an id of its own.
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer);
  std::vector<uint8_t>& flags = tokenizer->flags_;
  flags.assign(parts->vocabulary.size(), 0);
  for (uint32_t id = 0; id < flags.size(); ++id) flags[id] = parts->vocabulary.Contains(id) ? kKnown : 0;
  std::vector<AddedToken> raw, normalized;
  absl::flat_hash_set<std::string> normalized_contents;
  for (AddedToken& token : definition.added_tokens) {
    const auto complain = [&](std::string_view problem) {
      return absl::InvalidArgumentError(
          fmt::format("added token \"{}\" with id {} {}", Excerpt(token.content), token.id, problem));
    };
    if (!parts->added_ids.emplace(token.content, token.id).second) return complain("occurs twice");
    if (token.id >= flags.size()) flags.resize(size_t{token.id} + 1, 0);
    const std::optional<uint32_t> in_vocabulary = parts->vocabulary.FindSpelling(token.content);
    if (in_vocabulary && *in_vocabulary != token.id)
      return complain(fmt::format("has id {} in model.vocab", *in_vocabulary));
    if (!in_vocabulary) {
      if ((flags[token.id] & kKnown) != 0) return complain("has the id of another token");
      // Decoded by the same rule as the vocabulary's tokens, as the reference does.
      parts->added_bytes.emplace(token.id, BytesFromSpelling(token.content).value_or(token.content));
    }
    flags[token.id] |= kKnown | (token.special ? kSpecial : 0);
    if (token.normalized && definition.nfc) {
      token.content = ToNfc(token.content);
      if (token.content.size() > kMaxAddedTokenBytes) return complain("is too long in Normalization Form C");
      if (!normalized_contents.insert(token.content).second) return complain("occurs twice in Normalization Form C");
    }
    (token.normalized ? normalized : raw).push_back(std::move(token));
  }
  parts->nfc = definition.nfc;
  parts->added.emplace(std::move(raw));
  parts->normalized_added.emplace(std::move(normalized));

  for (const std::vector<uint32_t>* ids : {&definition.prefix_ids, &definition.suffix_ids})
    for (const uint32_t id : *ids)
      if (id >= flags.size() || (flags[id] & kKnown) == 0)
        return absl::InvalidArgumentError(fmt::format("post_processor uses token id {}, which names no token", id));
  parts->prefix_ids = std::move(definition.prefix_ids);
  parts->suffix_ids = std::move(definition.suffix_ids);
  if (!parts->prefix_ids.empty()) tokenizer->bos_id_ = parts->prefix_ids.front();

  tokenizer->parts_ = std::move(parts);
  for (uint32_t id = 0; id < flags.size(); ++id) {
    const std::string_view bytes = tokenizer->TokenBytes(id);
    if (ValidUtf8Prefix(bytes) == bytes.size()) flags[id] |= kWholeUtf8;
  }
  return tokenizer;
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes)
    return absl::InvalidArgumentError(fmt::format("text has {} bytes, must be at most {}", text.size(), kMaxTextBytes));
  if (const size_t valid = ValidUtf8Prefix(text); valid != text.size())
    return absl::InvalidArgumentError(fmt::format("text is not valid UTF-8 at byte {}", valid));

  const Parts& parts = *parts_;
  std::vector<uint32_t> ids;
  ids.reserve(parts.prefix_ids.size() + parts.suffix_ids.size() + text.size() / 3);
  if (options.add_special_tokens) ids = parts.prefix_ids;

  PreTokenizer::Scratch scratch(*parts.pre_tokenizer, text.size());
  const auto push = [&ids](uint32_t id) { ids.push_back(id); };
  const auto encode_words = [&](std::string_view segment) {
    return parts.pre_tokenizer->Split(segment, &scratch,
                                      [&](std::string_view word) { parts.encoder->Encode(word, &ids); });
  };
  std::string nfc;
  const auto find_normalized = [&](std::string_view segment) {
    if (parts.nfc && !IsSurelyNfc(segment)) segment = nfc = ToNfc(segment);
    return parts.normalized_added->Split(segment, options.parse_special_tokens, encode_words, push);
  };
  NIBBLE_RETURN_IF_ERROR(parts.added->Split(text, options.parse_special_tokens, find_normalized, push));

  if (options.add_special_tokens) ids.insert(ids.end(), parts.suffix_ids.begin(), parts.suffix_ids.end());
  return ids;
}

absl::StatusOr<std::string> Tokenizer::Decode(std::span<const uint32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!IsKnown(ids[i]))
      return absl::InvalidArgumentError(
          fmt::format("token id {} at position {} names no token; ids are below {}", ids[i], i, vocab_size()));
    if (!skip_special_tokens || !IsSpecial(ids[i])) bytes += TokenBytes(ids[i]);
  }
  if (ValidUtf8Prefix(bytes) == bytes.size()) return bytes;
  std::string text;
  if (AppendUtf8Lossy(bytes, &text) > 0) text += kReplacementCharacter;
  return text;
}

std::string_view Tokenizer::TokenBytes(uint32_t id) const {
  if (parts_->vocabulary.Contains(id)) return parts_->vocabulary.Bytes(id);
  const auto it = parts_->added_bytes.find(id);
  return it == parts_->added_bytes.end() ? std::string_view() : std::string_view(it->second);
}

std::optional<uint32_t> Tokenizer::TokenToId(std::string_view token) const {
  const auto it = parts_->added_ids.find(token);
  return it == parts_->added_ids.end() ? parts_->vocabulary.FindSpelling(token) : it->second;
}

}  // namespace nibble
