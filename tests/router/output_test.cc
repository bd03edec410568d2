#include "router/output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/metrics/registry.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const Tokenizer& TestTokenizer() {
  static const Tokenizer* tokenizer = Tokenizer::Load("deploy/models/novelist-17m").value().release();
  return *tokenizer;
}

std::vector<uint32_t> Encode(const std::string& text) {
  return TestTokenizer().Encode(text, {.add_special_tokens = false}).value();
}

// A client that reads when told to.
class FakeWriter : public StreamWriter {
 public:
  void Write(const v1::GenerateResponse& response) override {
    EXPECT_FALSE(writing) << "two writes at once";
    EXPECT_FALSE(finished.has_value());
    messages.push_back(response);
    writing = true;
  }
  void WriteAndFinish(const v1::GenerateResponse& response) override {
    Write(response);
    writing = false;
    finished = absl::OkStatus();
  }
  void Finish(const absl::Status& status) override {
    EXPECT_FALSE(writing) << "finished while a write was on its way";
    EXPECT_FALSE(finished.has_value()) << "finished twice";
    finished = status;
  }
  void Cancel() override { cancelled = true; }

  std::string text(uint32_t index = 0) const {
    std::string all;
    for (const auto& m : messages) all += m.index() == index ? m.text() : "";
    return all;
  }
  std::vector<uint32_t> ids(uint32_t index = 0) const {
    std::vector<uint32_t> all;
    for (const auto& m : messages) {
      if (m.index() == index) all.insert(all.end(), m.token_ids().begin(), m.token_ids().end());
    }
    return all;
  }
  const v1::Finish* finish(uint32_t index = 0) const {
    const v1::Finish* found = nullptr;
    for (const auto& m : messages) {
      if (m.index() == index && m.has_finish()) {
        EXPECT_EQ(found, nullptr) << "two finishes of sequence " << index;
        found = &m.finish();
      }
    }
    return found;
  }

  std::vector<v1::GenerateResponse> messages;
  bool writing = false, cancelled = false;
  std::optional<absl::Status> finished;
};

class OutputTest : public ::testing::Test {
 protected:
  void Start(OutputOptions options) {
    options.request_id = "r";
    options.max_tokens = 100;
    options.num_prompt_tokens = 7;
    options.arrived_at = Clock::now();
    stream_ = std::make_shared<OutputStream>(&writer_, &TestTokenizer(), &metrics_, 80,
                                             [this](uint64_t id) { cancelled_.push_back(id); });
    stream_->Configure(std::move(options));
  }
  // One token of sequence `index`; `last` = the scheduler's end.
  void Token(uint32_t id, std::optional<v1::FinishReason> last = {}, uint32_t index = 0) {
    SequenceEvent event;
    event.sequence_id = 80 + index;
    event.at = Clock::now();
    event.token_id = id;
    event.finish = last;
    event.cached_tokens = 3;
    stream_->Consume(std::move(event));
    stream_->Advance();
  }
  void ClientReads() {
    ASSERT_TRUE(writer_.writing);
    writer_.writing = false;
    stream_->OnWriteDone(true);
  }
  void ClientReadsAll() {
    while (writer_.writing) ClientReads();
  }
  void All(const std::vector<uint32_t>& ids, bool read = true) {
    for (size_t i = 0; i < ids.size(); ++i) {
      Token(ids[i], i + 1 == ids.size() ? std::optional(v1::FINISH_REASON_LENGTH) : std::nullopt);
      if (read) ClientReadsAll();
    }
  }

  MetricRegistry registry_;
  RequestMetrics metrics_{&registry_, "test"};
  FakeWriter writer_;
  std::shared_ptr<OutputStream> stream_;
  std::vector<uint64_t> cancelled_;
};

TEST_F(OutputTest, StreamsIdsTextAndFinish) {
  Start({});
  const std::vector<uint32_t> ids = Encode("It was a café — naïve, of course.");
  All(ids);
  EXPECT_EQ(writer_.ids(), ids);
  EXPECT_EQ(writer_.text(), "It was a café — naïve, of course.");
  ASSERT_NE(writer_.finish(), nullptr);
  EXPECT_EQ(writer_.finish()->finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(writer_.finish()->usage().completion_tokens(), ids.size());
  EXPECT_EQ(writer_.finish()->usage().prompt_tokens(), 7u);
  EXPECT_EQ(writer_.finish()->usage().cached_tokens(), 3u);
  EXPECT_TRUE(writer_.finished.has_value() && writer_.finished->ok());
  EXPECT_THAT(cancelled_, IsEmpty());
  for (const auto& m : writer_.messages) EXPECT_EQ(m.request_id(), "r");
}

// The same place whatever the timing: token by token, or everything merged behind a write that does not move.
TEST_F(OutputTest, StopStringCutsIdsAndTextAtTheSamePlaceWhateverTheTiming) {
  const std::string text = "He looked at the old house and said nothing at all.";
  const std::vector<uint32_t> ids = Encode(text);
  std::vector<uint32_t> want_ids;
  for (const bool read : {true, false}) {
    writer_ = FakeWriter();
    cancelled_.clear();
    Start({.stop = {"old hou"}});
    All(ids, read);
    ClientReadsAll();
    EXPECT_EQ(writer_.text(), "He looked at the ");
    ASSERT_NE(writer_.finish(), nullptr);
    EXPECT_EQ(writer_.finish()->finish_reason(), v1::FINISH_REASON_STOP);
    EXPECT_EQ(writer_.finish()->matched_stop_str(), "old hou");
    // The ids end with the token that completed the match, and usage counts exactly them.
    const std::string covered = TestTokenizer().Decode(writer_.ids()).value();
    EXPECT_THAT(covered, HasSubstr("old hou"));
    std::vector<uint32_t> shorter = writer_.ids();
    shorter.pop_back();
    EXPECT_EQ(TestTokenizer().Decode(shorter).value().find("old hou"), std::string::npos);
    EXPECT_EQ(writer_.finish()->usage().completion_tokens(), writer_.ids().size());
    EXPECT_THAT(cancelled_, ElementsAre(80u)) << "the scheduler is told once";
    EXPECT_TRUE(writer_.finished.has_value() && writer_.finished->ok());
    if (read) want_ids = writer_.ids();
    EXPECT_EQ(writer_.ids(), want_ids);
  }
}

TEST_F(OutputTest, StopStringIsShownWhenAskedFor) {
  Start({.stop = {"old hou"}, .include_stop_str = true});
  All(Encode("He looked at the old house and said"));
  EXPECT_EQ(writer_.text(), "He looked at the old hou");
}

TEST_F(OutputTest, StopStringsAreOffBeforeMinTokens) {
  const std::vector<uint32_t> ids = Encode("one two one two one two");
  Start({.min_tokens = 3, .stop = {"one"}});
  All(ids);
  std::vector<uint32_t> first(ids.begin(), ids.begin() + 3);
  const std::string before = TestTokenizer().Decode(first).value();
  ASSERT_THAT(before, HasSubstr("one")) << "the test needs a match that is ignored";
  EXPECT_EQ(writer_.text().substr(0, before.size()), before);
  ASSERT_NE(writer_.finish(), nullptr);
  EXPECT_EQ(writer_.finish()->matched_stop_str(), "one");
  EXPECT_GT(writer_.finish()->usage().completion_tokens(), 3u);
}

TEST_F(OutputTest, HeldBackTextComesOutWhenTheStopStringDoesNot) {
  Start({.stop = {"house of cards"}});
  All(Encode("the old house of"));
  EXPECT_EQ(writer_.text(), "the old house of");
  EXPECT_EQ(writer_.finish()->finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(OutputTest, TheStopTokenHasNoText) {
  const std::vector<uint32_t> ids = Encode("yes sir");
  Start({});
  for (size_t i = 0; i + 1 < ids.size(); ++i) Token(ids[i]);
  ClientReadsAll();
  const std::string before = writer_.text();
  Token(ids.back(), v1::FINISH_REASON_STOP);
  ClientReadsAll();
  EXPECT_EQ(writer_.text(), before);
  EXPECT_EQ(writer_.ids(), ids);
  EXPECT_EQ(writer_.finish()->matched_token_id(), ids.back());
}

TEST_F(OutputTest, MergesWhileTheClientIsBusy) {
  Start({});
  const std::vector<uint32_t> ids = Encode("a slow reader gets fewer and larger messages");
  All(ids, false);
  ASSERT_EQ(writer_.messages.size(), 1u);
  ClientReads();
  ASSERT_EQ(writer_.messages.size(), 2u) << "the rest is one message";
  EXPECT_EQ(writer_.ids(), ids);
  EXPECT_TRUE(writer_.finished.has_value());
}

TEST_F(OutputTest, SequencesOfOneRequestShareTheStreamAndFinishTogether) {
  Start({.n = 3});
  const std::vector<uint32_t> ids = Encode("she was there");
  for (uint32_t id : ids) {
    for (uint32_t i = 0; i < 3; ++i) Token(id, {}, i);
  }
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_FALSE(writer_.finished.has_value());
    Token(ids[0], v1::FINISH_REASON_LENGTH, i);
    ClientReadsAll();
  }
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(writer_.ids(i).size(), ids.size() + 1);
    ASSERT_NE(writer_.finish(i), nullptr);
  }
  EXPECT_TRUE(writer_.finished.has_value() && writer_.finished->ok());
}

TEST_F(OutputTest, AClientThatDoesNotReadLosesItsRequestAndNothingElse) {
  Start({.max_buffered_tokens = 20});
  const uint32_t id = Encode("the")[0];
  for (int i = 0; i < 40; ++i) Token(id);
  EXPECT_THAT(cancelled_, ElementsAre(80u));
  EXPECT_FALSE(writer_.finished.has_value()) << "the write is still on its way";
  ClientReads();  // it wakes up: what it gets is the reason, not the backlog
  ASSERT_TRUE(writer_.finished.has_value());
  EXPECT_EQ(writer_.finished->code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(writer_.finished->message()), HasSubstr("max-buffered-tokens"));
  EXPECT_EQ(writer_.messages.size(), 1u);
  EXPECT_FALSE(writer_.cancelled);
}

TEST_F(OutputTest, ACancelledCallFinishesOnceItsWriteIsBack) {
  Start({.n = 2});
  Token(Encode("the")[0]);
  ASSERT_TRUE(writer_.writing);
  stream_->OnCancel();
  EXPECT_FALSE(writer_.finished.has_value());
  EXPECT_THAT(cancelled_, ElementsAre(80u, 81u));
  EXPECT_TRUE(stream_->cancelled(0) && stream_->cancelled(1));
  writer_.writing = false;
  stream_->OnWriteDone(false);
  ASSERT_TRUE(writer_.finished.has_value());
  EXPECT_EQ(writer_.finished->code(), absl::StatusCode::kCancelled);
  stream_->Fail(absl::InternalError("late"));
  Token(5);  // a step that was on its way
}

TEST_F(OutputTest, AFinishedStreamIsFreedThoughItsLastWriteWasWatched) {
  Start({});
  Token(Encode("a")[0]);
  ASSERT_TRUE(writer_.writing);
  stream_->OnCancel();  // an alarm watches the write that is on its way
  ClientReads();
  ASSERT_TRUE(writer_.finished.has_value());
  const std::weak_ptr<OutputStream> stream = stream_;
  stream_.reset();
  const TimePoint deadline = Clock::now() + std::chrono::seconds(10);  // the alarm ends on a thread of gRPC's
  while (!stream.expired() && Clock::now() < deadline) std::this_thread::yield();
  EXPECT_TRUE(stream.expired());
}

TEST_F(OutputTest, AnErrorComesAfterWhatWasProduced) {
  Start({});
  const std::vector<uint32_t> ids = Encode("some words here");
  for (uint32_t id : ids) Token(id);
  stream_->Fail(absl::UnavailableError("gone"));
  EXPECT_FALSE(writer_.finished.has_value());
  ClientReadsAll();
  EXPECT_EQ(writer_.ids(), ids);
  ASSERT_TRUE(writer_.finished.has_value());
  EXPECT_EQ(writer_.finished->message(), "gone");
}

TEST_F(OutputTest, AnErrorBeforeConfigureFinishes) {
  auto stream = std::make_shared<OutputStream>(&writer_, &TestTokenizer(), &metrics_, 8, [](uint64_t) { FAIL(); });
  stream->Fail(absl::InvalidArgumentError("bad"));
  ASSERT_TRUE(writer_.finished.has_value());
  EXPECT_TRUE(stream->cancelled(0));
}

TEST_F(OutputTest, CountsRequests) {
  Start({});
  All(Encode("counted once"));
  const std::string text = registry_.Text();
  EXPECT_THAT(text, HasSubstr("nibble_request_success_total{finished_reason=\"length\",model_name=\"test\"} 1"));
  EXPECT_THAT(text, HasSubstr("nibble_time_to_first_token_seconds_count{model_name=\"test\"} 1"));
}

}  // namespace
}  // namespace nibble
