// Every field of GenerateRequest: what is accepted, what is refused and in which words.
#include "router/admission.h"

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const AdmitModel kModel = {.vocab_size = 1000, .max_context_length = 100, .eos_token_ids = {2, 3}};
const AdmitLimits kLimits;
constexpr uint64_t kDrawnSeed = 4242;

v1::GenerateRequest Request() {
  v1::GenerateRequest request;
  request.mutable_tokenized()->add_input_ids(7);
  return request;
}

absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> AdmitRequest(const v1::GenerateRequest& request,
                                                                    std::vector<uint32_t> prompt = {7}) {
  return Admit(request, std::move(prompt), kModel, kLimits, [] { return kDrawnSeed; });
}

struct Case {
  const char* field;        // of the violation; null: the request is good
  const char* description;  // part of it
  std::function<void(v1::GenerateRequest*)> change;
};

void PrintTo(const Case& c, std::ostream* out) { *out << (c.field ? c.field : "good") << " " << c.description; }

class AdmissionCase : public ::testing::TestWithParam<Case> {};

TEST_P(AdmissionCase, IsJudgedByItsField) {
  v1::GenerateRequest request = Request();
  GetParam().change(&request);
  const std::vector<FieldViolation> violations = CheckRequest(request, kModel, kLimits);
  const auto sequences = AdmitRequest(request);
  if (GetParam().field == nullptr) {
    EXPECT_TRUE(sequences.ok()) << sequences.status();
    EXPECT_THAT(violations, IsEmpty());
    return;
  }
  ASSERT_EQ(violations.size(), 1u) << sequences.status();
  EXPECT_EQ(violations[0].field, GetParam().field);
  EXPECT_THAT(violations[0].description, HasSubstr(GetParam().description));
  EXPECT_EQ(sequences.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(sequences.status().message(), absl::StrCat(violations[0].field, " ", violations[0].description));
}

v1::SamplingParams* S(v1::GenerateRequest* r) { return r->mutable_sampling_params(); }
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

INSTANTIATE_TEST_SUITE_P(Good, AdmissionCase,
                         ::testing::Values(Case{nullptr, "defaults", [](auto* r) {}},
                                           Case{nullptr, "limits",
                                                [](auto* r) {
                                                  r->set_request_id(std::string(128, 'a'));
                                                  r->set_cache_salt(std::string(128, 's'));
                                                  r->set_priority(-100);
                                                  S(r)->set_temperature(100), S(r)->set_top_p(1), S(r)->set_top_k(-1),
                                                      S(r)->set_min_p(1);
                                                  S(r)->set_frequency_penalty(-2), S(r)->set_presence_penalty(2),
                                                      S(r)->set_repetition_penalty(10);
                                                  S(r)->set_n(8), S(r)->set_logprobs(20), S(r)->set_prompt_logprobs(0);
                                                  S(r)->set_max_tokens(5), S(r)->set_min_tokens(5);
                                                  for (int i = 0; i < 16; ++i) S(r)->add_stop(std::string(256, 'x'));
                                                  for (int i = 0; i < 64; ++i) S(r)->add_stop_token_ids(999);
                                                  for (uint32_t i = 0; i < 300; ++i)
                                                    (*S(r)->mutable_logit_bias())[i] = -100;
                                                }},
                                           Case{nullptr, "id characters",
                                                [](auto* r) { r->set_request_id("Az09._:-"); }},
                                           Case{nullptr, "max_tokens beyond what the prompt leaves is cut",
                                                [](auto* r) { S(r)->set_max_tokens(100); }},
                                           Case{nullptr, "roles", [](auto* r) {
                                                  for (const char* role : {"system", "user", "assistant"}) {
                                                    r->mutable_chat()->add_messages()->set_role(role);
                                                  }
                                                }}));

INSTANTIATE_TEST_SUITE_P(
    Bad, AdmissionCase,
    ::testing::Values(
        Case{"request_id", "has 129 bytes, the limit is 128", [](auto* r) { r->set_request_id(std::string(129, 'a')); }},
        Case{"request_id", "may hold only [A-Za-z0-9._:-]", [](auto* r) { r->set_request_id("a b"); }},
        Case{"request_id", "a\\n", [](auto* r) { r->set_request_id("a\n"); }},
        Case{"input", "is missing", [](auto* r) { r->clear_input(); }},
        Case{"text", "is empty", [](auto* r) { r->set_text(""); }},
        Case{"tokenized.input_ids", "is empty", [](auto* r) { r->mutable_tokenized()->clear_input_ids(); }},
        Case{"chat.messages", "is empty", [](auto* r) { r->mutable_chat(); }},
        Case{"chat.messages[0].role", "is \"tool\"", [](auto* r) {
          r->mutable_chat()->add_messages()->set_role("tool");
        }},
        Case{"priority", "is 101, must be in [-100, 100]", [](auto* r) { r->set_priority(101); }},
        Case{"priority", "is -101", [](auto* r) { r->set_priority(-101); }},
        Case{"cache_salt", "has 129 bytes, the limit is 128", [](auto* r) { r->set_cache_salt(std::string(129, 's')); }},
        Case{"sampling_params.temperature", "is 101, must be in [0, 100]", [](auto* r) { S(r)->set_temperature(101); }},
        Case{"sampling_params.temperature", "is nan", [](auto* r) { S(r)->set_temperature(kNaN); }},
        Case{"sampling_params.temperature", "is inf", [](auto* r) { S(r)->set_temperature(kInfinity); }},
        Case{"sampling_params.temperature", "is -0.5", [](auto* r) { S(r)->set_temperature(-0.5f); }},
        Case{"sampling_params.top_p", "is 0, must be in (0, 1]", [](auto* r) { S(r)->set_top_p(0); }},
        Case{"sampling_params.top_p", "is 1.5", [](auto* r) { S(r)->set_top_p(1.5f); }},
        Case{"sampling_params.top_p", "is nan", [](auto* r) { S(r)->set_top_p(kNaN); }},
        Case{"sampling_params.top_k", "is -2", [](auto* r) { S(r)->set_top_k(-2); }},
        Case{"sampling_params.min_p", "is 1.25, must be in [0, 1]", [](auto* r) { S(r)->set_min_p(1.25f); }},
        Case{"sampling_params.min_p", "is nan", [](auto* r) { S(r)->set_min_p(kNaN); }},
        Case{"sampling_params.frequency_penalty", "is 2.5, must be in [-2, 2]",
             [](auto* r) { S(r)->set_frequency_penalty(2.5f); }},
        Case{"sampling_params.presence_penalty", "is -inf", [](auto* r) { S(r)->set_presence_penalty(-kInfinity); }},
        Case{"sampling_params.repetition_penalty", "is 0, must be in (0, 10]",
             [](auto* r) { S(r)->set_repetition_penalty(0); }},
        Case{"sampling_params.max_tokens", "is 0, must be 1 to the context length, 100", [](auto* r) { S(r)->set_max_tokens(0); }},
        Case{"sampling_params.max_tokens", "is 101, must be 1 to the context length, 100",
             [](auto* r) { S(r)->set_max_tokens(101); }},
        Case{"sampling_params.min_tokens", "is 6, must be at most max_tokens, which is 5",
             [](auto* r) { S(r)->set_max_tokens(5), S(r)->set_min_tokens(6); }},
        Case{"sampling_params.stop", "has 17 strings, the limit is 16",
             [](auto* r) { for (int i = 0; i < 17; ++i) S(r)->add_stop(std::string(1, 'x')); }},
        Case{"sampling_params.stop[1]", "has 0 bytes", [](auto* r) { S(r)->add_stop(std::string(1, 'x')), S(r)->add_stop(std::string()); }},
        Case{"sampling_params.stop[0]", "has 257 bytes, must have 1 to 256",
             [](auto* r) { S(r)->add_stop(std::string(257, 'x')); }},
        Case{"sampling_params.stop_token_ids", "has 65 ids, the limit is 64",
             [](auto* r) { for (int i = 0; i < 65; ++i) S(r)->add_stop_token_ids(1); }},
        Case{"sampling_params.stop_token_ids[0]", "is 1000, must be below the vocabulary size 1000",
             [](auto* r) { S(r)->add_stop_token_ids(1000); }},
        Case{"sampling_params.n", "is 0, must be in [1, 8]", [](auto* r) { S(r)->set_n(0); }},
        Case{"sampling_params.n", "is 4294967295", [](auto* r) { S(r)->set_n(4294967295u); }},
        Case{"sampling_params.logprobs", "is 21, must be in [0, 20]", [](auto* r) { S(r)->set_logprobs(21); }},
        Case{"sampling_params.prompt_logprobs", "is 21", [](auto* r) { S(r)->set_prompt_logprobs(21); }},
        Case{"sampling_params.logit_bias", "has 301 entries, the limit is 300",
             [](auto* r) { for (uint32_t i = 0; i < 301; ++i) (*S(r)->mutable_logit_bias())[i] = 1; }},
        Case{"sampling_params.logit_bias", "has token id 1000", [](auto* r) { (*S(r)->mutable_logit_bias())[1000] = 1; }},
        Case{"sampling_params.logit_bias", "of token 5 is nan", [](auto* r) { (*S(r)->mutable_logit_bias())[5] = kNaN; }},
        Case{"sampling_params.logit_bias", "of token 5 is 101, must be in [-100, 100]",
             [](auto* r) { (*S(r)->mutable_logit_bias())[5] = 101; }}));

TEST(Admission, ListsAllViolationsInMessageAndPayload) {
  v1::GenerateRequest request = Request();
  request.set_priority(1000);
  S(&request)->set_temperature(-1);
  S(&request)->set_n(9);
  const absl::Status status = AdmitRequest(request, {}).status();
  EXPECT_EQ(status.message(),
            "sampling_params.temperature is -1, must be in [0, 100]; sampling_params.n is 9, must be in [1, 8]; "
            "priority is 1000, must be in [-100, 100]");
  google::rpc::BadRequest details;
  ASSERT_TRUE(status.GetPayload(kBadRequestTypeUrl).has_value());
  ASSERT_TRUE(details.ParseFromString(std::string(*status.GetPayload(kBadRequestTypeUrl))));
  ASSERT_EQ(details.field_violations_size(), 3);
  EXPECT_EQ(details.field_violations(2).field(), "priority");
  EXPECT_EQ(details.field_violations(2).description(), "is 1000, must be in [-100, 100]");
}

TEST(Admission, ChecksThePrompt) {
  EXPECT_THAT(AdmitRequest(Request(), {7, 1000}).status().message(),
              HasSubstr("tokenized.input_ids[1] is 1000, must be below the vocabulary size 1000"));
  EXPECT_TRUE(AdmitRequest(Request(), std::vector<uint32_t>(99, 7)).ok());
  EXPECT_THAT(AdmitRequest(Request(), std::vector<uint32_t>(100, 7)).status().message(),
              HasSubstr("tokenized.input_ids has 100 tokens, the limit is 99"));
  v1::GenerateRequest text;
  text.set_text("x");
  EXPECT_THAT(AdmitRequest(text, {}).status().message(), HasSubstr("text has no tokens"));
  EXPECT_THAT(AdmitRequest(text, std::vector<uint32_t>(5000, 7)).status().message(), HasSubstr("text has 5000 tokens"));
  S(&text)->set_min_tokens(10);
  EXPECT_TRUE(AdmitRequest(text, std::vector<uint32_t>(90, 7)).ok());
  EXPECT_THAT(AdmitRequest(text, std::vector<uint32_t>(91, 7)).status().message(),
              HasSubstr("min_tokens is 10, must be at most 9"));
}

TEST(Admission, ResolvesDefaults) {
  const auto sequences = AdmitRequest(Request(), {7, 8, 9});
  ASSERT_TRUE(sequences.ok());
  ASSERT_EQ(sequences->size(), 1u);
  const Sequence& s = *sequences->front();
  EXPECT_THAT(s.token_ids, ElementsAre(7, 8, 9));
  EXPECT_EQ(s.num_prompt_tokens, 3u);
  EXPECT_EQ(s.max_tokens, 97u) << "what the context leaves";
  EXPECT_THAT(s.stop_ids, ElementsAre(2, 3));
  EXPECT_TRUE(s.use_prefix_cache);
  EXPECT_EQ(s.sampling.temperature(), 1.0f);
  EXPECT_EQ(s.sampling.top_p(), 1.0f);
  EXPECT_EQ(s.sampling.top_k(), 0u);
  EXPECT_EQ(s.sampling.repetition_penalty(), 1.0f);
  EXPECT_EQ(s.sampling.seed(), kDrawnSeed);
  EXPECT_FALSE(s.sampling.logprobs());
  EXPECT_EQ(s.sampling.suppressed_ids_size(), 0) << "nothing to suppress without min_tokens";
}

TEST(Admission, ResolvesWhatIsAsked) {
  v1::GenerateRequest request = Request();
  request.set_priority(5);
  request.set_cache_salt("tenant");
  auto* s = S(&request);
  s->set_temperature(0.00001f);
  s->set_top_k(5000);
  s->set_max_tokens(100);
  s->set_min_tokens(4);
  s->add_stop_token_ids(9), s->add_stop_token_ids(1), s->add_stop_token_ids(2);
  s->set_n(3);
  s->set_seed(std::numeric_limits<uint64_t>::max());
  s->set_logprobs(0);
  s->set_prompt_logprobs(2);
  (*s->mutable_logit_bias())[30] = 3;
  (*s->mutable_logit_bias())[20] = 2;
  const auto sequences = AdmitRequest(request, {7, 8});
  ASSERT_TRUE(sequences.ok()) << sequences.status();
  ASSERT_EQ(sequences->size(), 3u);
  for (uint32_t i = 0; i < 3; ++i) {
    const Sequence& q = *(*sequences)[i];
    EXPECT_EQ(q.index, i);
    EXPECT_THAT(q.token_ids, ElementsAre(7, 8));
    EXPECT_EQ(q.sampling.seed(), uint64_t{i} - 1) << "seed + i, modulo 2^64";
    EXPECT_EQ(q.max_tokens, 98u);
    EXPECT_EQ(q.priority, 5);
    EXPECT_EQ(q.cache_salt, "tenant");
    EXPECT_FALSE(q.use_prefix_cache) << "prompt scores need every row";
    EXPECT_THAT(q.stop_ids, ElementsAre(1, 2, 3, 9));
    EXPECT_THAT(q.sampling.suppressed_ids(), ElementsAre(1, 2, 3, 9));
    EXPECT_EQ(q.sampling.min_tokens(), 4u);
    EXPECT_EQ(q.sampling.temperature(), 0.0f) << "too small to divide by: greedy";
    EXPECT_EQ(q.sampling.top_k(), 0u) << "all of the vocabulary is off";
    EXPECT_TRUE(q.sampling.logprobs());
    EXPECT_EQ(q.sampling.num_top_logprobs(), 0u);
    EXPECT_EQ(q.sampling.num_top_prompt_logprobs(), 2u);
    EXPECT_THAT(q.sampling.bias_ids(), ElementsAre(20, 30));
    EXPECT_THAT(q.sampling.bias_values(), ElementsAre(2, 3));
  }
}

TEST(Admission, IgnoreEosKeepsStopIds) {
  v1::GenerateRequest request = Request();
  S(&request)->set_ignore_eos(true);
  S(&request)->add_stop_token_ids(9);
  const auto sequences = AdmitRequest(request);
  ASSERT_TRUE(sequences.ok());
  EXPECT_THAT(sequences->front()->stop_ids, ElementsAre(9));
}

TEST(Admission, DrawsASeedOnceAndOnlyWhenAbsent) {
  int drawn = 0;
  const auto draw = [&] { return ++drawn, uint64_t{100}; };
  v1::GenerateRequest request = Request();
  S(&request)->set_n(2);
  const auto unseeded = Admit(request, {7}, kModel, kLimits, draw);
  ASSERT_TRUE(unseeded.ok());
  EXPECT_EQ((*unseeded)[1]->sampling.seed(), 101u);
  EXPECT_EQ(drawn, 1);
  S(&request)->set_seed(0);
  const auto seeded = Admit(request, {7}, kModel, kLimits, draw);
  ASSERT_TRUE(seeded.ok());
  EXPECT_EQ((*seeded)[0]->sampling.seed(), 0u);
  EXPECT_EQ(drawn, 1);
}

}  // namespace
}  // namespace nibble
