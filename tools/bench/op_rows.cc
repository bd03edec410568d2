// Embedding, norm, SiLU and the quantization of a linear's input, each as one operator.
#include <algorithm>
#include <numeric>
#include <random>

#include "tools/bench/op_case.h"

namespace nibble {
namespace {

constexpr int64_t kCheckedRows = 3;
constexpr int kSegments = 8;             // a permutation stays inside an eighth of the channels
constexpr int64_t kHadamardSize = 512;   // or the largest that divides the features
constexpr int64_t kEmbedRows = 16384;
constexpr int64_t kMaxCopies = 64;

// The tensors of one operator on one backend.
class RowsSide {
 public:
  RowsSide(Ops& ops, const OpSpec& spec, int64_t rows, int64_t copies)
      : ops_(ops), op_(spec.op), rows_(rows), k_(Features(spec)), in_cols_(op_ == "silu_mul_quantize" ? 2 * k_ : k_),
        codes_(ops, rows * k_), scales_(ops, rows), sums_(ops, rows), bits_(ops, BlockBits(k_, spec.variant == "a8")),
        perm_(ops, Permutation(k_)), weight_(ops, RandomBF16(op_ == "embed" ? kEmbedRows * k_ : k_, 1)),
        ids_(ops, Ids(rows)) {
    coding_ = {.k = k_, .quantized = true, .block_bits = bits_.data()};
    if (spec.variant == "permuted") coding_.perm = perm_.data();
    if (spec.variant == "hadamard") coding_.hadamard = std::min(kHadamardSize, k_ & -k_);
    for (int64_t i = 0; i < copies; ++i) {
      in_.emplace_back(ops, RandomBF16(rows * in_cols_, 3));
      if (op_ == "add_norm_quantize") delta_.emplace_back(ops, RandomBF16(rows * in_cols_, 2));
    }
  }

  static int64_t Features(const OpSpec& spec) {
    const OpModel& m = spec.model;
    return spec.op == "silu_mul_quantize" ? m.ffn : spec.op == "quantize" ? m.q_heads * m.head_dim : m.hidden;
  }

  void Issue(int launch) {
    const Rows in = {in_[launch % in_.size()].data(), DType::kBF16, rows_, in_cols_};
    LinearInput out = {.rows = rows_, .k = k_, .codes = codes_.data(), .scales = scales_.data(), .code_sums = sums_.data()};
    if (op_ == "embed") {
      ops_.Embed({.token_ids = ids_.data(), .table = weight_.data(), .vocab = kEmbedRows, .out = in});
    } else if (op_ == "add_norm_quantize") {
      const Rows delta = {delta_[launch % delta_.size()].data(), DType::kBF16, rows_, in_cols_};
      ops_.AddNormQuantize(
          {.residual = in, .delta = &delta, .weight = weight_.data(), .eps = 1e-5f, .coding = &coding_, .out = &out});
    } else if (op_ == "quantize") {
      ops_.Quantize({.in = in, .coding = &coding_, .out = &out});
    } else {
      ops_.SiluMulQuantize({.gate_up = in, .coding = &coding_, .out = &out});
    }
  }

  void Reset() {
    codes_.Poison();
    scales_.Poison();
    sums_.Poison();
    const std::vector<BF16> contents = RandomBF16(rows_ * in_cols_, 3);
    ops_.Upload(in_[0].data(), contents.data(), contents.size() * sizeof(BF16));
  }

  std::string Differs(const RowsSide& want) const {
    if (op_ == "embed" || op_ == "add_norm_quantize") {
      const std::string found = FirstFarBF16("the residual", in_[0].Get(), want.in_[0].Get(), 0);
      if (!found.empty() || op_ == "embed") return found;
    }
    // Code by code, the CPU's: the order of every sum is fixed (docs/numerics.md).
    for (const std::string& found : {FirstDifference<int8_t>("codes", codes_.Get(), want.codes_.Get()),
                                     FirstDifference<float>("scales", scales_.Get(), want.scales_.Get()),
                                     FirstDifference<int32_t>("code_sums", sums_.Get(), want.sums_.Get())}) {
      if (!found.empty()) return found;
    }
    return "";
  }

  double Bytes() const {
    const double in = 2.0 * rows_ * in_cols_, coded = rows_ * (k_ + 8.0);
    if (op_ == "embed") return 2 * in;
    if (op_ == "add_norm_quantize") return 3 * in + coded;  // residual both ways, delta
    return in + coded;
  }

 private:
  static std::vector<int32_t> Permutation(int64_t k) {
    std::vector<int32_t> perm(k);
    std::iota(perm.begin(), perm.end(), 0);
    std::mt19937 random(4);
    for (int64_t i = 0; i < kSegments; ++i) std::shuffle(perm.begin() + i * k / kSegments, perm.begin() + (i + 1) * k / kSegments, random);
    return perm;
  }
  static std::vector<int32_t> Ids(int64_t rows) {
    std::vector<int32_t> ids(rows);
    for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(i * 7919 % kEmbedRows);
    return ids;
  }

  Ops& ops_;
  std::string op_;
  int64_t rows_, k_, in_cols_;
  OpArray<int8_t> codes_;
  OpArray<float> scales_;
  OpArray<int32_t> sums_;
  OpArray<uint8_t> bits_;
  OpArray<int32_t> perm_;
  InputCoding coding_;
  OpArray<BF16> weight_;
  OpArray<int32_t> ids_;
  std::vector<OpArray<BF16>> in_, delta_;
};

class RowsCase final : public OpCase {
 public:
  RowsCase(const OpContext& context, const OpSpec& spec)
      : side_(context.ops, spec, spec.rows,
              std::clamp<int64_t>(context.rotate_bytes / (2 * spec.rows * RowsSide::Features(spec)), 1, kMaxCopies)),
        checked_(context.specification, spec, std::min(spec.rows, kCheckedRows), 1) {
    bytes = side_.Bytes();
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
  RowsSide side_, checked_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OpCase>> MakeRowsCase(const OpContext& context, const OpSpec& spec) {
  return std::make_unique<RowsCase>(context, spec);
}

}  // namespace nibble
