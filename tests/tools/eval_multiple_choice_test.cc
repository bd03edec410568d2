// Questions from JSONL: what is read, what is refused, how it is scored.
#include "tools/eval/multiple_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "tests/tools/eval_rig.h"
#include "tests/model/tiny_model.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
constexpr char kModel[] = "deploy/models/novelist-17m";

TEST(ParseChoiceQuestion, ReadsEveryForm) {
  const auto plain = ParseChoiceQuestion(R"({"context": "It was", "choices": ["a", "b", "c"], "answer": 2})", "f:1");
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(plain->context, "It was");
  EXPECT_THAT(plain->choices, ElementsAre("a", "b", "c"));
  EXPECT_EQ(plain->answer, 2u);
  const auto hellaswag = ParseChoiceQuestion(
      R"({"ind": 4, "ctx_a": "A man", "ctx": "A man is", "endings": ["up", "down"], "label": "1"})", "f:1");
  ASSERT_TRUE(hellaswag.ok()) << hellaswag.status();
  EXPECT_EQ(hellaswag->context, "A man is");
  EXPECT_EQ(hellaswag->answer, 1u);
  const auto arc = ParseChoiceQuestion(
      R"({"id": "x", "question": "Why?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"})",
      "f:1");
  ASSERT_TRUE(arc.ok()) << arc.status();
  EXPECT_EQ(arc->context, "Question: Why?\nAnswer:");
  EXPECT_EQ(arc->answer, 1u);
}

TEST(ParseChoiceQuestion, SaysWhatIsWrong) {
  const struct {
    const char* json;
    const char* message;
  } cases[] = {
      {"{", "f:7: not valid JSON"},
      {"[]", "f:7: is no JSON object"},
      {R"({"choices": ["a", "b"], "answer": 0})", "context or question or ctx is missing"},
      {R"({"context": "x", "question": "y", "choices": ["a", "b"], "answer": 0})", "context and question are both given"},
      {R"({"context": 3, "choices": ["a", "b"], "answer": 0})", "context is number, must be a string"},
      {R"({"context": "x", "choices": ["a"], "answer": 0})", "choices has 1 entries, must have 2 to 64"},
      {R"({"context": "x", "choices": "ab", "answer": 0})", "choices is string, must be a list"},
      {R"({"context": "x", "choices": ["a", ""], "answer": 0})", "choices[1] is empty"},
      {R"({"context": "x", "choices": ["a", "b"]})", "answer or label or answerKey is missing"},
      {R"({"context": "x", "choices": ["a", "b"], "answer": 2})", "answer is 2, must be in 0..1"},
      {R"({"context": "x", "choices": ["a", "b"], "answer": -1})", "answer is -1"},
      {R"({"context": "x", "choices": ["a", "b"], "answer": "B"})", "must be the index of a choice"},
      {R"({"context": "x", "choices": ["a", "b"], "answer": 0.5})", "must be the index of a choice"},
      {R"({"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "B"})",
       "has 2 texts and 3 labels"},
      {R"({"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"})",
       "answerKey is none of the labels"},
      {R"({"question": "x", "choices": {"text": ["a", "b"]}, "answerKey": "A"})", "choices.label is null"},
  };
  for (const auto& [json, message] : cases) {
    const auto question = ParseChoiceQuestion(json, "f:7");
    EXPECT_EQ(question.status().code(), absl::StatusCode::kInvalidArgument) << json;
    EXPECT_THAT(std::string(question.status().message()), HasSubstr(message));
    EXPECT_THAT(std::string(question.status().message()), HasSubstr("f:7"));
  }
}

TEST(LoadChoiceQuestions, CountsLines) {
  const testing::TempDir dir;
  std::ofstream(dir / "q") << "\n" << R"({"context": "x", "choices": ["a", "b"], "answer": 1})" << "\r\n\n";
  const auto questions = LoadChoiceQuestions(dir / "q");
  ASSERT_TRUE(questions.ok()) << questions.status();
  ASSERT_EQ(questions->size(), 1u);
  EXPECT_EQ(questions->front().line, 2);
  std::ofstream(dir / "q", std::ios::app) << "{}\n";
  EXPECT_THAT(std::string(LoadChoiceQuestions(dir / "q").status().message()), HasSubstr("q:4: "));
  std::ofstream(dir / "empty") << "\n";
  EXPECT_THAT(std::string(LoadChoiceQuestions(dir / "empty").status().message()), HasSubstr("has no question"));
  EXPECT_EQ(LoadChoiceQuestions(dir / "none").status().code(), absl::StatusCode::kNotFound);
}

class BundledModel : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(kModel);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(BundledModel, ScoresTheTokensOfTheChoiceOnly) {
  const std::vector<ChoiceQuestion> questions = {{.context = "He opened the", .choices = {"door", "door and"}}};
  const auto tokens = EncodeChoices(*tokenizer_, questions, 100);
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  for (size_t c = 0; c < 2; ++c) {
    const ChoiceTokens& choice = (*tokens)[0][c];
    const auto tail = tokenizer_->Decode(std::span(choice.ids).subspan(choice.begin));
    ASSERT_TRUE(tail.ok());
    EXPECT_EQ(*tail, " " + questions[0].choices[c]);
    EXPECT_EQ(choice.ids[0], *tokenizer_->bos_id());
  }
  const auto too_long = EncodeChoices(*tokenizer_, questions, 4);
  EXPECT_THAT(std::string(too_long.status().message()), HasSubstr("the model's context has 4"));
}

// The length-normalised score finds both right answers; the plain sum may prefer a short wrong one.
TEST_F(BundledModel, FindsWhatTheTextSays) {
  const std::vector<ChoiceQuestion> questions = {
      {.context = "He opened the", .choices = {"door", "of of", "xq"}, .answer = 0},
      {.context = "She could not help", .choices = {"it .", "smiling at the thought", "brt zz"}, .answer = 1},
      {.context = "I beg your", .choices = {"the of", "pardon, sir", "kk"}, .answer = 2}};
  const auto tokens = EncodeChoices(*tokenizer_, questions, 64);
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  testing::TappedEngine engine(kModel, 64);
  int64_t finished = 0;
  const auto report = AnswerQuestions(*engine.group, questions, *tokens, [&](int64_t n) { finished += n; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(finished, 9);
  EXPECT_EQ(report->questions, 3);
  EXPECT_EQ(report->correct_normalized, 2);  // the last one's answer is wrong on purpose
  EXPECT_GE(report->correct, 1);
  EXPECT_LE(report->correct, 2);
  EXPECT_NEAR(report->chance, 1.0 / 3, 1e-12);
}

TEST(StandardError, OfAShare) {
  EXPECT_NEAR(StandardError(0.5, 101), 0.05, 1e-12);
  EXPECT_EQ(StandardError(0.5, 1), 0);
}

}  // namespace
}  // namespace nibble
