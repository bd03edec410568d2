// The sampler and the history of tokens, to the bit.
#include <algorithm>

#include "tools/bench/op_case.h"

namespace nibble {
namespace {

constexpr int64_t kCheckedRows = 2;
constexpr int64_t kMaxCopies = 8;

SampleRow RowOf(const std::string& variant) {
  SampleRow row;
  if (variant == "logprobs") row.num_logprobs = 5;
  if (variant != "greedy" && variant != "logprobs") row.temperature = 0.8f;
  if (variant == "top_k") row.top_k = 40;
  if (variant == "top_p") row.top_p = 0.95f;
  return row;
}

class SampleSide {
 public:
  SampleSide(Ops& ops, const OpSpec& spec, int64_t rows, int64_t copies)
      : ops_(ops), rows_(rows), vocab_(spec.model.full_vocab), params_(ops, Params(spec.variant, rows)), ids_(ops, rows),
        top_ids_(ops, rows * kMaxTopLogprobs), logprobs_(ops, rows), top_logprobs_(ops, rows * kMaxTopLogprobs) {
    const std::vector<float> logits = RandomFloats(rows * vocab_, 1, 3.0f);
    for (int64_t i = 0; i < copies; ++i) logits_.emplace_back(ops, logits);
  }

  void Issue(int launch) {
    ops_.Sample({.logits = logits_[launch % logits_.size()].data(),
                 .rows = rows_,
                 .vocab = vocab_,
                 .params = params_.data(),
                 .token_ids = ids_.data(),
                 .logprobs = logprobs_.data(),
                 .top_ids = top_ids_.data(),
                 .top_logprobs = top_logprobs_.data()});
  }
  void Reset() {
    ids_.Poison();
    logprobs_.Poison();
    top_ids_.Poison();
    top_logprobs_.Poison();
  }
  std::string Differs(const SampleSide& want) const {
    for (const std::string& found :
         {FirstDifference<int32_t>("ids", ids_.Get(), want.ids_.Get()),
          FirstDifference<float>("logprobs", logprobs_.Get(), want.logprobs_.Get()),
          FirstDifference<int32_t>("top_ids", top_ids_.Get(), want.top_ids_.Get()),
          FirstDifference<float>("top_logprobs", top_logprobs_.Get(), want.top_logprobs_.Get())}) {
      if (!found.empty()) return found;
    }
    return "";
  }

 private:
  static std::vector<SampleRow> Params(const std::string& variant, int64_t rows) {
    std::vector<SampleRow> params(rows, RowOf(variant));
    for (int64_t i = 0; i < rows; ++i) {
      params[i].seed = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
      params[i].position = static_cast<int32_t>(i);
    }
    return params;
  }

  Ops& ops_;
  int64_t rows_, vocab_;
  OpArray<SampleRow> params_;
  OpArray<int32_t> ids_, top_ids_;
  OpArray<float> logprobs_, top_logprobs_;
  std::vector<OpArray<float>> logits_;
};

class SampleCase final : public OpCase {
 public:
  SampleCase(const OpContext& context, const OpSpec& spec)
      : side_(context.ops, spec, spec.rows,
              std::clamp<int64_t>(context.rotate_bytes / (4 * spec.rows * spec.model.full_vocab), 1, kMaxCopies)),
        checked_(context.specification, spec, std::min(spec.rows, kCheckedRows), 1) {
    bytes = 4.0 * spec.rows * spec.model.full_vocab;
  }
  void Issue(int launch) override { side_.Issue(launch); }
  std::string Check() override {
    side_.Reset();
    checked_.Reset();
    side_.Issue(0);
    checked_.Issue(0);
    return side_.Differs(checked_);
  }

 private:
  SampleSide side_, checked_;
};

class HistoryCase final : public OpCase {
 public:
  HistoryCase(const OpContext& context, const OpSpec& spec)
      : ops_(context.ops), specification_(context.specification), vocab_(spec.model.full_vocab), tokens_(spec.rows),
        ids_(ops_, Ids()), history_(ops_, vocab_), checked_ids_(specification_, Ids()), checked_(specification_, vocab_) {
    bytes = 2.0 * vocab_ + 8.0 * tokens_;
  }
  void Issue(int launch) override { Record(ops_, ids_, history_); }
  std::string Check() override {
    history_.Poison();
    Record(ops_, ids_, history_);
    Record(specification_, checked_ids_, checked_);
    return FirstDifference<uint16_t>("history", history_.Get(), checked_.Get());
  }

 private:
  std::vector<int32_t> Ids() const {
    std::vector<int32_t> ids(tokens_);
    for (int64_t i = 0; i < tokens_; ++i) ids[i] = static_cast<int32_t>(i * i % 977 % vocab_);
    return ids;
  }
  void Record(Ops& ops, const OpArray<int32_t>& ids, const OpArray<uint16_t>& history) const {
    ops.RecordHistory({.history = history.data(),
                       .vocab = vocab_,
                       .token_ids = ids.data(),
                       .count = tokens_,
                       .num_prompt = tokens_ / 2});
  }

  Ops &ops_, &specification_;
  int64_t vocab_, tokens_;
  OpArray<int32_t> ids_;
  OpArray<uint16_t> history_;
  OpArray<int32_t> checked_ids_;
  OpArray<uint16_t> checked_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OpCase>> MakeSamplingCase(const OpContext& context, const OpSpec& spec) {
  if (spec.op == "record_history") return std::make_unique<HistoryCase>(context, spec);
  return std::make_unique<SampleCase>(context, spec);
}

}  // namespace nibble
