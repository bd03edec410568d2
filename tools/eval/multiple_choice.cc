#include "tools/eval/multiple_choice.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/model/json_file.h"
#include "tools/eval/scorer.h"

namespace nibble {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;
constexpr size_t kMaxChoices = 64;
constexpr size_t kSequencesAtATime = 1024;  // bounds the memory of scores

using Json = nlohmann::json;

class QuestionParser {
 public:
  QuestionParser(const Json& json, const std::string& what) : json_(json), what_(what) {}

  absl::StatusOr<ChoiceQuestion> Parse() {
    ChoiceQuestion out;
    NIBBLE_ASSIGN_OR_RETURN(const std::string context_field, OneOf({"context", "question", "ctx"}));
    NIBBLE_ASSIGN_OR_RETURN(out.context, Text(json_[context_field], context_field));
    if (context_field == "question") out.context = absl::StrCat("Question: ", out.context, "\nAnswer:");
    NIBBLE_ASSIGN_OR_RETURN(const std::string choices_field, OneOf({"choices", "endings"}));
    const Json& choices = json_[choices_field];
    std::vector<std::string> labels;
    if (choices.is_object()) {
      NIBBLE_ASSIGN_OR_RETURN(out.choices, Texts(choices.value("text", Json()), choices_field + ".text"));
      NIBBLE_ASSIGN_OR_RETURN(labels, Texts(choices.value("label", Json()), choices_field + ".label"));
      if (labels.size() != out.choices.size()) {
        return Wrong(choices_field, absl::StrCat("has ", out.choices.size(), " texts and ", labels.size(), " labels"));
      }
    } else {
      NIBBLE_ASSIGN_OR_RETURN(out.choices, Texts(choices, choices_field));
    }
    NIBBLE_ASSIGN_OR_RETURN(out.answer, Answer(labels, out.choices.size()));
    return out;
  }

 private:
  absl::Status Wrong(const std::string& field, const std::string& reason) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": ", field, " ", reason));
  }

  absl::StatusOr<std::string> OneOf(std::initializer_list<const char*> names) const {
    std::vector<std::string> present, all(names.begin(), names.end());
    for (const std::string& name : all) {
      if (json_.contains(name)) present.push_back(name);
    }
    if (present.size() == 1) return present.front();
    if (present.empty()) return Wrong(absl::StrJoin(all, " or "), "is missing");
    return Wrong(absl::StrJoin(present, " and "), "are both given, must be one of them");
  }

  absl::StatusOr<std::string> Text(const Json& json, const std::string& field) const {
    if (!json.is_string()) return Wrong(field, absl::StrCat("is ", json.type_name(), ", must be a string"));
    if (json.get_ref<const std::string&>().empty()) return Wrong(field, "is empty");
    return json.get<std::string>();
  }

  absl::StatusOr<std::vector<std::string>> Texts(const Json& json, const std::string& field) const {
    if (!json.is_array()) return Wrong(field, absl::StrCat("is ", json.type_name(), ", must be a list of strings"));
    if (json.size() < 2 || json.size() > kMaxChoices) {
      return Wrong(field, absl::StrCat("has ", json.size(), " entries, must have 2 to ", kMaxChoices));
    }
    std::vector<std::string> out;
    for (size_t i = 0; i < json.size(); ++i) {
      NIBBLE_ASSIGN_OR_RETURN(std::string text, Text(json[i], absl::StrCat(field, "[", i, "]")));
      out.push_back(std::move(text));
    }
    return out;
  }

  absl::StatusOr<size_t> Answer(const std::vector<std::string>& labels, size_t choices) const {
    NIBBLE_ASSIGN_OR_RETURN(const std::string field, OneOf({"answer", "label", "answerKey"}));
    const Json& json = json_[field];
    int64_t index = -1;
    if (!labels.empty()) {
      NIBBLE_ASSIGN_OR_RETURN(const std::string key, Text(json, field));
      index = std::ranges::find(labels, key) - labels.begin();
      if (index == static_cast<int64_t>(labels.size())) return Wrong(field, "is none of the labels: " + Quoted(key));
    } else if (json.is_number_integer()) {
      index = json.get<int64_t>();
    } else if (!json.is_string() || !absl::SimpleAtoi(json.get_ref<const std::string&>(), &index)) {
      return Wrong(field, "must be the index of a choice: " + Quoted(json.dump()));
    }
    if (index < 0 || index >= static_cast<int64_t>(choices)) {
      return Wrong(field, absl::StrCat("is ", index, ", must be in 0..", choices - 1));
    }
    return static_cast<size_t>(index);
  }

  const Json& json_;
  const std::string& what_;
};

}  // namespace

absl::StatusOr<ChoiceQuestion> ParseChoiceQuestion(const std::string& text, const std::string& what) {
  NIBBLE_ASSIGN_OR_RETURN(const Json json, ParseJson(text, what));
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(what, ": is no JSON object"));
  return QuestionParser(json, what).Parse();
}

absl::StatusOr<std::vector<ChoiceQuestion>> LoadChoiceQuestions(const std::string& path) {
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxFileBytes));
  std::vector<ChoiceQuestion> questions;
  int64_t number = 0;
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(text, '\n'))) {
    ++number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    NIBBLE_ASSIGN_OR_RETURN(ChoiceQuestion question, ParseChoiceQuestion(line, absl::StrCat(path, ":", number)));
    question.line = number;
    questions.push_back(std::move(question));
  }
  if (questions.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": has no question"));
  return questions;
}

absl::StatusOr<std::vector<std::vector<ChoiceTokens>>> EncodeChoices(const Tokenizer& tokenizer,
                                                                     std::span<const ChoiceQuestion> questions,
                                                                     int64_t max_tokens) {
  const auto encode = [&](const std::string& text,
                          const ChoiceQuestion& question) -> absl::StatusOr<std::vector<uint32_t>> {
    auto ids = tokenizer.Encode(text, {.add_special_tokens = true, .parse_special_tokens = false});
    if (!ids.ok()) return Annotate(ids.status(), absl::StrCat("line ", question.line));
    return ids;
  };
  std::vector<std::vector<ChoiceTokens>> out;
  for (const ChoiceQuestion& question : questions) {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<uint32_t> context, encode(question.context, question));
    std::vector<ChoiceTokens> choices;
    for (const std::string& choice : question.choices) {
      ChoiceTokens tokens;
      NIBBLE_ASSIGN_OR_RETURN(tokens.ids, encode(absl::StrCat(question.context, " ", choice), question));
      if (static_cast<int64_t>(tokens.ids.size()) > max_tokens) {
        return absl::InvalidArgumentError(absl::StrCat("line ", question.line, ": has ", tokens.ids.size(),
                                                       " tokens, the model's context has ", max_tokens));
      }
      // Where the tokens part from the context's own: a merge across the seam belongs to the choice.
      const auto parted = std::ranges::mismatch(context, tokens.ids);
      tokens.begin = std::max<size_t>(1, static_cast<size_t>(parted.in2 - tokens.ids.begin()));
      choices.push_back(std::move(tokens));
    }
    out.push_back(std::move(choices));
  }
  return out;
}

double StandardError(double share, int64_t n) {
  return n < 2 ? 0 : std::sqrt(share * (1 - share) / static_cast<double>(n - 1));
}

absl::StatusOr<ChoiceReport> AnswerQuestions(EngineGroup& group, std::span<const ChoiceQuestion> questions,
                                             std::span<const std::vector<ChoiceTokens>> tokens,
                                             const std::function<void(int64_t finished)>& done) {
  ChoiceReport report;
  for (size_t first = 0; first < questions.size();) {
    std::vector<std::vector<uint32_t>> sequences;
    size_t last = first;
    for (; last < questions.size() && sequences.size() < kSequencesAtATime; ++last) {
      for (const ChoiceTokens& choice : tokens[last]) sequences.push_back(choice.ids);
    }
    NIBBLE_ASSIGN_OR_RETURN(const auto scores, Score(group, sequences, /*num_top_logprobs=*/0, done));
    size_t sequence = 0;
    for (size_t q = first; q < last; ++q) {
      const ChoiceQuestion& question = questions[q];
      std::vector<double> sums, per_byte;
      for (size_t c = 0; c < question.choices.size(); ++c, ++sequence) {
        double sum = 0;
        for (size_t i = tokens[q][c].begin; i < tokens[q][c].ids.size(); ++i)
          sum += static_cast<double>(scores[sequence][i - 1].logprob);
        sums.push_back(sum);
        per_byte.push_back(sum / static_cast<double>(question.choices[c].size()));
      }
      const auto best = [](const std::vector<double>& values) {
        return static_cast<size_t>(std::ranges::max_element(values) - values.begin());
      };
      ++report.questions;
      report.correct += best(sums) == question.answer;
      report.correct_normalized += best(per_byte) == question.answer;
      report.chance += 1.0 / static_cast<double>(question.choices.size());
    }
    first = last;
  }
  if (report.questions > 0) report.chance /= static_cast<double>(report.questions);
  return report;
}

}  // namespace nibble
