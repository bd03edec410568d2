// RoPE and append, and attention over a cache that append filled.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "tools/bench/op_case.h"

namespace nibble {
namespace {

constexpr int64_t kFillRows = 4096;  // tokens appended at a time
constexpr int64_t kMaxCopies = 64;
constexpr int64_t kRaggedLengths = 8192;
constexpr int64_t kShortLength = 512, kShortLengths = 1024;  // of most sequences of a mixed batch
constexpr double kRopeTheta = 500000;

// One sequence of a step: its last `rows` tokens of `context` are the step's.
struct OpSequence {
  int64_t context, rows;
};

// The tables of a step on a backend. Pages of a sequence are spread over the pool.
class OpStep {
 public:
  OpStep(Ops& ops, const std::vector<OpSequence>& sequences) {
    std::vector<int32_t> positions, row_sequence, row_begin = {0}, tables;
    for (const OpSequence& s : sequences) max_pages = std::max(max_pages, (s.context + kPageTokens - 1) / kPageTokens);
    for (const OpSequence& s : sequences) {
      const int64_t pages = (s.context + kPageTokens - 1) / kPageTokens;
      for (int64_t i = 0; i < max_pages; ++i) {
        tables.push_back(i < pages ? static_cast<int32_t>(num_pages + i) : 0);
      }
      for (int64_t i = 0; i < pages / 2; i += 2) std::swap(tables.end()[-max_pages + i], tables.end()[-max_pages + pages - 1 - i]);
      num_pages += pages;
      for (int64_t i = s.context - s.rows; i < s.context; ++i) {
        positions.push_back(static_cast<int32_t>(i));
        row_sequence.push_back(static_cast<int32_t>(row_begin.size()) - 1);
      }
      row_begin.push_back(static_cast<int32_t>(positions.size()));
    }
    rows_ = static_cast<int64_t>(positions.size());
    sequences_ = static_cast<int64_t>(sequences.size());
    positions_.emplace(ops, positions);
    row_sequence_.emplace(ops, row_sequence);
    row_begin_.emplace(ops, row_begin);
    tables_.emplace(ops, tables);
  }

  StepRows rows() const {
    return {rows_, sequences_, positions_->data(), row_sequence_->data(), row_begin_->data(), tables_->data(), max_pages};
  }
  int64_t max_pages = 0, num_pages = 0;

 private:
  int64_t rows_, sequences_;
  std::optional<OpArray<int32_t>> positions_, row_sequence_, row_begin_, tables_;
};

std::vector<float> CosSin(int64_t positions, int64_t d) {
  std::vector<float> table(positions * d);
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const double angle = static_cast<double>(p) * std::pow(kRopeTheta, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      table[p * d + i] = static_cast<float>(std::cos(angle));
      table[p * d + d / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

class AttentionSide {
 public:
  AttentionSide(Ops& ops, const OpModel& model, const std::vector<OpSequence>& sequences, int64_t copies)
      : ops_(ops), model_(model), layout_{KvFormat::kKV4, model.kv_heads, model.head_dim}, step_(ops, sequences),
        cols_((model.q_heads + 2 * model.kv_heads) * model.head_dim), rows_(step_.rows().rows),
        max_positions_(step_.max_pages * kPageTokens), cos_sin_(ops, CosSin(max_positions_, model.head_dim)),
        out_(ops, rows_ * model.q_heads * model.head_dim) {
    for (int64_t i = 0; i < copies; ++i) {
      pages_.emplace_back(ops, step_.num_pages * layout_.page_bytes());
      qkv_.emplace_back(ops, RandomBF16(rows_ * cols_, 1));
    }
    FillPages(sequences);
    ops_.BeginStep({.step = step_.rows(), .q_heads = model_.q_heads, .layout = layout_});
  }

  void Attend(int launch) {
    ops_.Attention({.step = step_.rows(),
                    .qkv = Qkv(launch),
                    .q_heads = model_.q_heads,
                    .pages = Pages(launch),
                    .scale = 1 / std::sqrt(static_cast<float>(model_.head_dim)),
                    .out = {out_.data(), DType::kBF16, rows_, model_.q_heads * model_.head_dim}});
  }
  void Append(int launch) {
    ops_.RopeAppend({.step = step_.rows(),
                     .qkv = Qkv(launch),
                     .q_heads = model_.q_heads,
                     .cos_sin = cos_sin_.data(),
                     .max_positions = max_positions_,
                     .pages = Pages(launch)});
  }

  void ResetQkv() {
    const std::vector<BF16> contents = RandomBF16(rows_ * cols_, 1);
    ops_.Upload(qkv_[0].data(), contents.data(), contents.size() * sizeof(BF16));
    ops_.BeginStep({.step = step_.rows(), .q_heads = model_.q_heads, .layout = layout_});
  }
  void SetRow(int64_t row, std::span<const BF16> values) {
    ops_.Upload(qkv_[0].data() + row * cols_, values.data(), values.size_bytes());
  }
  OpArray<BF16>& out() { return out_; }
  const OpArray<BF16>& qkv() const { return qkv_[0]; }
  int64_t cols() const { return cols_; }
  int64_t out_cols() const { return model_.q_heads * model_.head_dim; }

 private:
  Rows Qkv(int launch) const { return {qkv_[launch % qkv_.size()].data(), DType::kBF16, rows_, cols_}; }
  KvPages Pages(int launch) const { return {pages_[launch % pages_.size()].data(), step_.num_pages, layout_}; }

  // Every sequence holds the same tokens, so that one alone, on another backend, is like it among others.
  void FillPages(const std::vector<OpSequence>& sequences) {
    const OpArray<BF16> tokens(ops_, RandomBF16(kFillRows * cols_, 2));
    int64_t first_page = 0;
    for (const OpSequence& s : sequences) {
      const int64_t pages = (s.context + kPageTokens - 1) / kPageTokens;
      const OpStep whole(ops_, {{s.context, 0}});  // for its page table
      for (int64_t at = 0; at < s.context; at += kFillRows) {
        const int64_t end = std::min(at + kFillRows, s.context);
        const OpStep chunk(ops_, {{end, end - at}});
        const StepRows rows = chunk.rows();
        StepRows placed = whole.rows();
        placed.rows = rows.rows;
        placed.positions = rows.positions;
        placed.row_sequence = rows.row_sequence;
        placed.row_begin = rows.row_begin;
        ops_.BeginStep({.step = placed, .q_heads = model_.q_heads, .layout = layout_});
        ops_.RopeAppend({.step = placed,
                         .qkv = {tokens.data(), DType::kBF16, placed.rows, cols_},
                         .q_heads = model_.q_heads,
                         .cos_sin = cos_sin_.data(),
                         .max_positions = max_positions_,
                         .pages = {pages_[0].data() + first_page * layout_.page_bytes(), pages, layout_}});
        NIBBLE_CHECK(ops_.Synchronize().ok(), "appending failed");  // before the tables go
      }
      first_page += pages;
    }
    if (pages_.size() == 1) return;
    const std::vector<uint8_t> contents = pages_[0].Get();
    for (size_t i = 1; i < pages_.size(); ++i) ops_.Upload(pages_[i].data(), contents.data(), contents.size());
  }

  Ops& ops_;
  OpModel model_;
  KvLayout layout_;
  OpStep step_;
  int64_t cols_, rows_, max_positions_;
  OpArray<float> cos_sin_;
  OpArray<BF16> out_;
  std::vector<OpArray<uint8_t>> pages_;  // launches take these
  std::vector<OpArray<BF16>> qkv_;       // and these in turn
};

std::vector<OpSequence> SequencesOf(const OpSpec& spec) {
  if (spec.op == "prefill") return {{std::max(spec.context, spec.rows), spec.rows}};
  if (spec.op == "rope_append") {
    if (spec.rows > 64) return {{spec.rows, spec.rows}};
    return std::vector<OpSequence>(spec.rows, {kPageTokens, 1});
  }
  std::vector<OpSequence> sequences(spec.rows, {spec.context, 1});
  if (spec.context != 0) return sequences;
  for (int64_t i = 0; i < spec.rows; ++i) {
    const int64_t scattered = (i * 7919 + 4000) % spec.rows;
    int64_t& context = sequences[i].context;
    if (spec.variant == "mixed") {  // one of sixteen is long, the others short
      context = scattered % 16 == 0 ? kRaggedLengths : kShortLength + scattered * kShortLengths / spec.rows;
    } else {  // lengths 1..8192, evenly, in a scattered order
      context = 1 + scattered * (kRaggedLengths - 1) / std::max<int64_t>(spec.rows - 1, 1);
    }
  }
  return sequences;
}

double KvBytes(const OpModel& model, double tokens) {
  return tokens * static_cast<double>(KvLayout{KvFormat::kKV4, model.kv_heads, model.head_dim}.page_bytes()) / kPageTokens;
}

int64_t CopiesOf(const OpContext& context, const OpSpec& spec) {
  if (spec.op == "prefill") return 1;
  double tokens = 0;
  for (const OpSequence& s : SequencesOf(spec)) tokens += static_cast<double>(s.context);
  // Appending reads and writes the rows, attending reads the cache.
  const OpModel& m = spec.model;
  const double moved = spec.op == "attention" ? KvBytes(m, tokens)
                                              : 2.0 * static_cast<double>(spec.rows * (m.q_heads + 2 * m.kv_heads) * m.head_dim);
  return std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(context.rotate_bytes) / moved), 1, kMaxCopies);
}

class AttentionCase final : public OpCase {
 public:
  AttentionCase(const OpContext& context, const OpSpec& spec)
      : specification_(context.specification), spec_(spec), sequences_(SequencesOf(spec)),
        side_(context.ops, spec.model, sequences_, CopiesOf(context, spec)) {
    double tokens = 0, scores = 0;
    for (const OpSequence& s : sequences_) {
      tokens += static_cast<double>(s.context);
      for (int64_t i = s.context - s.rows; i < s.context; ++i) scores += static_cast<double>(i + 1);
    }
    const double head = static_cast<double>(spec.model.head_dim), heads = static_cast<double>(spec.model.q_heads);
    bytes = KvBytes(spec.model, tokens) + 4.0 * static_cast<double>(Rows()) * heads * head;
    operations = 4 * scores * heads * head;
    unit = OpUnit::kBF16;
  }

  void Issue(int launch) override { side_.Attend(launch); }

  // The last row of the last sequence, alone on the CPU. Its context was appended there too, so this checks both.
  std::string Check() override {
    side_.out().Poison();
    side_.Attend(0);
    const std::vector<BF16> got = side_.out().Get();
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i].bits == 0xffff) return absl::StrCat("output ", i, " was not written");
    }
    AttentionSide alone(specification_, spec_.model, {{sequences_.back().context, 1}}, 1);
    const std::vector<BF16> qkv = side_.qkv().Get();
    alone.SetRow(0, std::span(qkv).last(side_.cols()));
    alone.Attend(0);
    // Rounded probabilities and another order of sums: a few units of the last place of the largest outputs.
    const std::vector<BF16> want = alone.out().Get();
    float largest = 0;
    for (BF16 x : want) largest = std::max(largest, std::abs(ToFloat(x)));
    return FirstFarBF16("the last row", std::span(got).last(side_.out_cols()), want, 1, largest / 128);
  }

 private:
  int64_t Rows() const { return spec_.rows; }

  Ops& specification_;
  OpSpec spec_;
  std::vector<OpSequence> sequences_;
  AttentionSide side_;
};

class AppendCase final : public OpCase {
 public:
  AppendCase(const OpContext& context, const OpSpec& spec)
      : side_(context.ops, spec.model, SequencesOf(spec), CopiesOf(context, spec)),
        checked_(context.specification, spec.model, SequencesOf(spec), 1) {
    const OpModel& m = spec.model;
    const double rows = static_cast<double>(spec.rows), d = static_cast<double>(m.head_dim);
    bytes = rows * d * (2.0 * static_cast<double>(2 * m.q_heads + 2 * m.kv_heads) + 4) + KvBytes(m, rows);
  }
  void Issue(int launch) override { side_.Append(launch); }
  std::string Check() override {
    side_.ResetQkv();
    checked_.ResetQkv();
    side_.Append(0);
    checked_.Append(0);
    return FirstFarBF16("qkv", side_.qkv().Get(), checked_.qkv().Get(), 0);
  }

 private:
  AttentionSide side_, checked_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OpCase>> MakeAttentionCase(const OpContext& context, const OpSpec& spec) {
  if (spec.op == "prefill" && spec.context < spec.rows) {
    return absl::InvalidArgumentError(absl::StrCat("prefill of ", spec.rows, " rows in a context of ", spec.context));
  }
  if (spec.op == "rope_append") return std::make_unique<AppendCase>(context, spec);
  return std::make_unique<AttentionCase>(context, spec);
}

}  // namespace nibble
