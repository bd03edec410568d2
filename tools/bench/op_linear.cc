// Linear layers: quantized ones and lm_head. Checked against sums computed here from the logical weight.
#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "tools/bench/op_case.h"

namespace nibble {
namespace {

constexpr int kSamples = 512;  // outputs looked at, besides that all were written
constexpr int kMaxCopies = 64;

// [N, K] of the projections that share an input.
std::pair<int64_t, int64_t> LinearShape(const OpSpec& spec) {
  const OpModel& m = spec.model;
  if (spec.op == "lm_head") return {m.vocab, m.hidden};
  if (spec.variant == "qkv") return {(m.q_heads + 2 * m.kv_heads) * m.head_dim, m.hidden};
  if (spec.variant == "o") return {m.hidden, m.q_heads * m.head_dim};
  if (spec.variant == "gate_up") return {2 * m.ffn, m.hidden};
  return {m.hidden, m.ffn};
}

int64_t Copies(int64_t bytes, int64_t rotate_bytes) {
  return std::clamp<int64_t>((rotate_bytes + bytes - 1) / bytes, 1, kMaxCopies);
}

class W4Case final : public OpCase {
 public:
  static absl::StatusOr<std::unique_ptr<OpCase>> Make(const OpContext& context, const OpSpec& spec) {
    auto made = std::make_unique<W4Case>(context, spec);
    for (int64_t i = Copies(made->n * made->k / 2, context.rotate_bytes); i > 0; --i) {
      const W4View view = {made->n,
                           made->k,
                           made->qweight_.data(),
                           made->group_scale_.data(),
                           made->group_min_.data(),
                           made->channel_scale_.data(),
                           made->block_bits_.data()};
      NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Weight> weight, context.ops.PackW4({&view, 1}));
      made->weights_.push_back(std::move(weight));
    }
    return made;
  }

  W4Case(const OpContext& context, const OpSpec& spec) : ops_(context.ops), rows_(spec.rows) {
    std::tie(n, k) = LinearShape(spec);
    const int64_t groups = n * k / kBlock;
    qweight_ = RandomBytes(n * k / 2, 1);
    const std::vector<uint8_t> random = RandomBytes(groups, 2);
    for (uint8_t r : random) {  // s2 in 4..8, m + 15 · s2 <= 127
      group_scale_.push_back(4 + r % 5);
      group_min_.push_back(static_cast<int8_t>(-110 + r / 5 % 110));
    }
    for (float x : RandomFloats(n, 3)) channel_scale_.push_back(0.001f + 0.0001f * std::abs(x));
    Quantize(context.specification);
    device_codes_.emplace(ops_, codes_);
    device_scales_.emplace(ops_, scales_);
    device_sums_.emplace(ops_, sums_);
    device_exponents_.emplace(ops_, exponents_);
    out_.emplace(ops_, rows_ * n);
    unit = OpUnit::kInt8;
    operations = 2.0 * rows_ * n * k;
    bytes = n * k / 2 + 2.0 * groups + 4.0 * n + rows_ * (k + 8.0 + 2.0 * n);
  }

  void Issue(int launch) override {
    ops_.Linear({.input = {.rows = rows_,
                           .k = k,
                           .codes = device_codes_->data(),
                           .scales = device_scales_->data(),
                           .code_sums = device_sums_->data(),
                           .exponents = device_exponents_->data()},
                 .weight = weights_[launch % weights_.size()].get(),
                 .out = {out_->data(), DType::kBF16, rows_, n}});
  }

  std::string Check() override {
    out_->Poison();
    Issue(0);
    const std::vector<BF16> got = out_->Get();
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i].bits == 0xffff) return absl::StrCat("output ", i, " was not written");
    }
    std::mt19937 random(6);
    for (int i = 0; i < kSamples; ++i) {
      const int64_t t = random() % rows_, c = random() % n;
      int64_t sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = c * k + j;
        const int code = qweight_[at / 2] >> (at % 2 * 4) & 15;
        sum += int64_t{codes_[t * k + j]} * (code * group_scale_[at / kBlock] + group_min_[at / kBlock]);
      }
      const BF16 want = ToBF16(static_cast<float>(sum) * (scales_[t] * channel_scale_[c]));
      if (got[t * n + c].bits != want.bits) {
        return absl::StrCat("[", t, ", ", c, "] is ", ToFloat(got[t * n + c]), ", not ", ToFloat(want));
      }
    }
    return "";
  }

 private:
  // The input as a model would code it, W4A4 with a few wide blocks: what the bits are decides how much power a
  // multiplication takes, and so the clock.
  void Quantize(Ops& specification) {
    block_bits_ = BlockBits(k, false);
    codes_.resize(rows_ * k);
    scales_.resize(rows_);
    sums_.resize(rows_);
    exponents_.resize(rows_ * k / kBlock);
    std::vector<BF16> x = RandomBF16(rows_ * k, 4);
    const InputCoding coding = {.k = k, .quantized = true, .block_bits = block_bits_.data()};
    LinearInput out = {.rows = rows_,
                       .k = k,
                       .codes = codes_.data(),
                       .scales = scales_.data(),
                       .code_sums = sums_.data(),
                       .exponents = exponents_.data()};
    specification.Quantize({.in = {x.data(), DType::kBF16, rows_, k}, .coding = &coding, .out = &out});
  }

  Ops& ops_;
  const int64_t rows_;
  std::vector<uint8_t> qweight_, group_scale_, block_bits_, exponents_;
  std::vector<int8_t> group_min_, codes_;
  std::vector<float> channel_scale_, scales_;
  std::vector<int32_t> sums_;
  std::optional<OpArray<int8_t>> device_codes_;
  std::optional<OpArray<float>> device_scales_;
  std::optional<OpArray<int32_t>> device_sums_;
  std::optional<OpArray<uint8_t>> device_exponents_;
  std::optional<OpArray<BF16>> out_;
  std::vector<std::unique_ptr<Weight>> weights_;
};

// bf16 rows × bf16 weights to f32 logits. Their sums have no one order, so they are compared with f64 within what
// rounding every step of a chain of K may cost on random data.
class LmHeadCase final : public OpCase {
 public:
  static absl::StatusOr<std::unique_ptr<OpCase>> Make(const OpContext& context, const OpSpec& spec) {
    auto made = std::make_unique<LmHeadCase>(context, spec);
    for (int64_t i = Copies(made->n * made->k * 2, context.rotate_bytes); i > 0; --i) {
      const DenseView view = {made->n, made->k, made->weight_.data()};
      NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Weight> weight, context.ops.PackDense({&view, 1}));
      made->weights_.push_back(std::move(weight));
    }
    return made;
  }

  LmHeadCase(const OpContext& context, const OpSpec& spec) : ops_(context.ops), rows_(spec.rows) {
    std::tie(n, k) = LinearShape(spec);
    weight_ = RandomBF16(n * k, 1, 0.05f);
    x_ = RandomBF16(rows_ * k, 2);
    in_.emplace(ops_, x_);
    out_.emplace(ops_, rows_ * n);
    unit = OpUnit::kBF16;
    operations = 2.0 * rows_ * n * k;
    bytes = 2.0 * n * k + rows_ * (2.0 * k + 4.0 * n);
  }

  void Issue(int launch) override {
    ops_.Linear({.input = {.rows = rows_, .k = k, .dense = {in_->data(), DType::kBF16, rows_, k}},
                 .weight = weights_[launch % weights_.size()].get(),
                 .out = {out_->data(), DType::kF32, rows_, n}});
  }

  std::string Check() override {
    out_->Poison();
    Issue(0);
    const std::vector<float> got = out_->Get();
    for (size_t i = 0; i < got.size(); ++i) {
      if (std::isnan(got[i])) return absl::StrCat("output ", i, " was not written");
    }
    std::mt19937 random(6);
    for (int i = 0; i < kSamples; ++i) {
      const int64_t t = random() % rows_, c = random() % n;
      double sum = 0, magnitude = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double product = double{ToFloat(x_[t * k + j])} * ToFloat(weight_[c * k + j]);
        sum += product;
        magnitude += std::abs(product);
      }
      if (!(std::abs(got[t * n + c] - sum) <= 1e-5 * magnitude)) {
        return absl::StrCat("[", t, ", ", c, "] is ", got[t * n + c], ", not ", sum);
      }
    }
    return "";
  }

 private:
  Ops& ops_;
  const int64_t rows_;
  std::vector<BF16> weight_, x_;
  std::optional<OpArray<BF16>> in_;
  std::optional<OpArray<float>> out_;
  std::vector<std::unique_ptr<Weight>> weights_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OpCase>> MakeLinearCase(const OpContext& context, const OpSpec& spec) {
  return spec.op == "lm_head" ? LmHeadCase::Make(context, spec) : W4Case::Make(context, spec);
}

}  // namespace nibble
