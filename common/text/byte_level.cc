#include "common/text/byte_level.h"

#include <array>
#include <cstdint>

#include "common/text/utf8.h"

namespace nibble {
namespace {

constexpr int kAlphabetEnd = 0x100 + 68;

constexpr bool IsPrintable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// Code point -> byte, or -1.
constexpr std::array<int16_t, kAlphabetEnd> MakeAlphabet() {
  std::array<int16_t, kAlphabetEnd> alphabet{};
  for (int16_t& entry : alphabet) entry = -1;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) alphabet[IsPrintable(byte) ? byte : next++] = static_cast<int16_t>(byte);
  return alphabet;
}

constexpr std::array<int16_t, kAlphabetEnd> kAlphabet = MakeAlphabet();
static_assert(kAlphabet[0x120] == ' ' && kAlphabet[0x10A] == '\n' && kAlphabet[kAlphabetEnd - 1] == 0xAD);

}  // namespace

std::optional<std::string> BytesFromSpelling(std::string_view spelling) {
  std::string bytes;
  bytes.reserve(spelling.size());
  while (!spelling.empty()) {
    const Utf8Step step = ReadUtf8(spelling);
    if (step.kind != Utf8Step::kCharacter || step.code_point >= kAlphabetEnd) return std::nullopt;
    const int16_t byte = kAlphabet[step.code_point];
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
    spelling.remove_prefix(step.length);
  }
  return bytes;
}

}  // namespace nibble
