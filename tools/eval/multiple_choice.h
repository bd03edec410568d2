// Multiple-choice questions answered by likelihood, as ARC and HellaSwag are scored: the choice whose tokens the model
// finds most likely after the question, by their sum and by their sum per byte of the choice.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/text/tokenizer.h"
#include "tools/eval/engine_group.h"

namespace nibble {

struct ChoiceQuestion {
  std::string context;               // what stands before a choice
  std::vector<std::string> choices;  // as in the file, without the space that joins one to the context
  size_t answer = 0;
  int64_t line = 0;  // in the file, from 1
};

// One JSON object a line, in one of these forms (blank lines are skipped):
//   {"context": "...", "choices": ["...", ...], "answer": 2}     context as it is; "question" instead of it becomes
//                                                                "Question: ...\nAnswer:"
//   HellaSwag's own: "ctx", "endings", "label" (a number or its digits)
//   ARC's own: "question", "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"
// INVALID_ARGUMENT with line number, field and reason.
absl::StatusOr<std::vector<ChoiceQuestion>> LoadChoiceQuestions(const std::string& path);
absl::StatusOr<ChoiceQuestion> ParseChoiceQuestion(const std::string& json, const std::string& what);

// A choice after its context. Tokens from `begin` on are scored.
struct ChoiceTokens {
  std::vector<uint32_t> ids;
  size_t begin = 0;
};
// [question][choice]. The tokenizer's special tokens stand in front, as in a request. INVALID_ARGUMENT with the line
// for a text that is not UTF-8 or longer than max_tokens.
absl::StatusOr<std::vector<std::vector<ChoiceTokens>>> EncodeChoices(const Tokenizer& tokenizer,
                                                                     std::span<const ChoiceQuestion> questions,
                                                                     int64_t max_tokens);

struct ChoiceReport {
  int64_t questions = 0;
  int64_t correct = 0;             // by log-probability
  int64_t correct_normalized = 0;  // by log-probability per byte of the choice
  double chance = 0;               // expected share of a guess

  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(questions); }
  double accuracy_normalized() const {
    return static_cast<double>(correct_normalized) / static_cast<double>(questions);
  }
};
// Standard error of a share measured on n questions.
double StandardError(double share, int64_t n);

// The group has ScoringLimits for the longest sequence. done hears how many sequences each step finished.
absl::StatusOr<ChoiceReport> AnswerQuestions(EngineGroup& group, std::span<const ChoiceQuestion> questions,
                                             std::span<const std::vector<ChoiceTokens>> tokens,
                                             const std::function<void(int64_t finished)>& done);

}  // namespace nibble
