// Reads tests/text/data; make_fixtures.py says what is in it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/text/tokenizer.h"

namespace nibble {

inline constexpr char kBundledModel[] = "deploy/models/novelist-17m";  // tests run in the repository's root
inline constexpr size_t kFixtureStep = 12;                             // STEP

inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::vector<std::string> ReadLines(const std::string& path) {
  std::vector<std::string> lines;
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << path;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

// Two base-64 digits an id.
inline std::vector<uint32_t> IdsFromDigits(std::string_view digits) {
  static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<uint32_t> ids;
  for (size_t i = 0; i + 1 < digits.size(); i += 2)
    ids.push_back(static_cast<uint32_t>(kDigits.find(digits[i]) * 64 + kDigits.find(digits[i + 1])));
  return ids;
}

// "llama3" is the bundled model's tokenizer.
inline std::unique_ptr<Tokenizer> LoadFixtureTokenizer(const std::string& name) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      name == "llama3" ? Tokenizer::Load(kBundledModel)
                       : Tokenizer::FromJson(ReadText("tests/text/data/" + name + ".tokenizer.json"));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

}  // namespace nibble
