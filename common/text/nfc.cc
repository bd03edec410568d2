#include "common/text/nfc.h"

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/text/utf8.h"

namespace nibble {
namespace {

struct Decomposition {
  char32_t composed;
  char32_t first;
  char32_t second;
  bool composes;
};
struct CombiningRange {
  char32_t first;
  char32_t last;
  uint8_t combining_class;
};

#include "common/text/nfc_tables.inc"

// Hangul syllables are arithmetic (The Unicode Standard, section 3.12).
constexpr char32_t kSyllables = 0xAC00, kLeading = 0x1100, kVowels = 0x1161, kTrailing = 0x11A7;
constexpr char32_t kNumLeading = 19, kNumVowels = 21, kNumTrailing = 28;
constexpr char32_t kNumSyllables = kNumLeading * kNumVowels * kNumTrailing;

constexpr char32_t kTableEnd = 0x30000;  // no character from here on has a decomposition or a combining class

struct Tables {
  absl::flat_hash_map<char32_t, const Decomposition*> decompositions;
  absl::flat_hash_map<uint64_t, char32_t> compositions;  // first << 32 | second
  absl::flat_hash_map<char32_t, uint8_t> classes;
  std::bitset<kTableEnd> suspicious;  // may change, move or combine with what stands before

  Tables() {
    for (const Decomposition& entry : kDecompositions) {
      decompositions.emplace(entry.composed, &entry);
      if (entry.composes) {
        compositions.emplace(uint64_t{entry.first} << 32 | entry.second, entry.composed);
        suspicious.set(entry.second);
      } else {
        suspicious.set(entry.composed);
      }
    }
    for (const CombiningRange& range : kCombiningRanges) {
      for (char32_t c = range.first; c <= range.last; ++c) {
        classes.emplace(c, range.combining_class);
        suspicious.set(c);
      }
    }
    for (char32_t c = kVowels; c < kVowels + kNumVowels; ++c) suspicious.set(c);
    for (char32_t c = kTrailing + 1; c < kTrailing + kNumTrailing; ++c) suspicious.set(c);
  }
};

const Tables& GetTables() {
  static const std::unique_ptr<const Tables> tables = std::make_unique<Tables>();
  return *tables;
}

struct Character {
  char32_t code_point;
  uint8_t combining_class;
};

void Decompose(const Tables& tables, char32_t c, std::vector<Character>* out) {
  if (c >= kSyllables && c < kSyllables + kNumSyllables) {
    const char32_t index = c - kSyllables;
    out->push_back({kLeading + index / (kNumVowels * kNumTrailing), 0});
    out->push_back({kVowels + index / kNumTrailing % kNumVowels, 0});
    if (index % kNumTrailing != 0) out->push_back({kTrailing + index % kNumTrailing, 0});
    return;
  }
  const auto entry = tables.decompositions.find(c);
  if (entry == tables.decompositions.end()) {
    const auto combining = tables.classes.find(c);
    out->push_back({c, combining == tables.classes.end() ? uint8_t{0} : combining->second});
    return;
  }
  Decompose(tables, entry->second->first, out);  // at most four deep
  if (entry->second->second != 0) Decompose(tables, entry->second->second, out);
}

// The primary composite of two characters, or 0.
char32_t Compose(const Tables& tables, char32_t first, char32_t second) {
  if (first - kLeading < kNumLeading && second - kVowels < kNumVowels)
    return kSyllables + ((first - kLeading) * kNumVowels + (second - kVowels)) * kNumTrailing;
  if (first - kSyllables < kNumSyllables && (first - kSyllables) % kNumTrailing == 0 && second > kTrailing &&
      second < kTrailing + kNumTrailing)
    return first + (second - kTrailing);
  const auto entry = tables.compositions.find(uint64_t{first} << 32 | second);
  return entry == tables.compositions.end() ? 0 : entry->second;
}

}  // namespace

bool IsSurelyNfc(std::string_view text) {
  const Tables& tables = GetTables();
  for (size_t i = 0; i < text.size();) {
    if (static_cast<uint8_t>(text[i]) < 0xCC) {  // begins nothing above U+02FF; continuation bytes never stand here
      i += static_cast<uint8_t>(text[i]) < 0x80 ? 1 : 2;
      continue;
    }
    const Utf8Step step = ReadUtf8(text.substr(i));
    if (step.code_point < kTableEnd && tables.suspicious[step.code_point]) return false;
    i += step.length;
  }
  return true;
}

std::string ToNfc(std::string_view text) {
  const Tables& tables = GetTables();
  std::vector<Character> characters;
  characters.reserve(text.size());
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Step step = ReadUtf8(rest);
    Decompose(tables, step.code_point, &characters);
    rest.remove_prefix(step.length);
  }

  // Canonical order: marks behind a starter by their class, equal classes in the order of the text.
  for (auto begin = characters.begin(); begin != characters.end();) {
    if (begin->combining_class == 0) {
      ++begin;
      continue;
    }
    const auto end = std::find_if(begin, characters.end(), [](const Character& c) { return c.combining_class == 0; });
    std::stable_sort(begin, end,
                     [](const Character& a, const Character& b) { return a.combining_class < b.combining_class; });
    begin = end;
  }

  // Composition: a character joins the last starter unless a kept mark of the same or a higher class stands between.
  size_t kept = 0;
  size_t starter = SIZE_MAX;
  int last_class = -1;  // of the marks kept behind the starter; -1: none
  for (const Character& c : characters) {
    if (starter != SIZE_MAX && last_class < int{c.combining_class}) {
      if (const char32_t composite = Compose(tables, characters[starter].code_point, c.code_point); composite != 0) {
        characters[starter].code_point = composite;
        continue;
      }
    }
    last_class = c.combining_class;
    if (c.combining_class == 0) {
      starter = kept;
      last_class = -1;
    }
    characters[kept++] = c;
  }

  std::string result;
  result.reserve(text.size());
  for (size_t i = 0; i < kept; ++i) AppendUtf8(characters[i].code_point, &result);
  return result;
}

}  // namespace nibble
