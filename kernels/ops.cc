// What every backend may rely on, checked once. Only shapes, pointers and values that are on the host are looked at;
// contents of device memory are a backend's own concern.
#include "kernels/ops.h"

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace nibble {
namespace {

constexpr int64_t kMaxQuantizedK = int64_t{1} << 15;  // |Σ x8 · (q4 · s2 + m)| <= 127 · 127 · K stays below 2^31

void CheckRows(const Rows& rows, const char* name) {
  NIBBLE_CHECK(rows.rows >= 0 && rows.cols > 0, absl::StrCat(name, " is [", rows.rows, ", ", rows.cols, "]"));
  NIBBLE_CHECK(rows.data != nullptr || rows.rows == 0, absl::StrCat(name, ".data is null"));
}

void CheckCoded(const InputCoding* coding, const LinearInput* out, int64_t rows, int64_t k) {
  NIBBLE_CHECK(coding != nullptr && out != nullptr, "coding or out is null");
  NIBBLE_CHECK_EQ(coding->k, k);
  NIBBLE_CHECK_EQ(out->k, k);
  NIBBLE_CHECK_EQ(out->rows, rows);
  if (coding->hadamard != 0) {
    NIBBLE_CHECK(coding->hadamard > 0 && (coding->hadamard & (coding->hadamard - 1)) == 0 && k % coding->hadamard == 0,
                 absl::StrCat("hadamard size ", coding->hadamard, " for k ", k));
  }
  if (!coding->quantized) {
    CheckRows(out->dense, "out.dense");
    NIBBLE_CHECK(out->codes == nullptr, "out.codes is set for a dense linear");
    NIBBLE_CHECK_EQ(out->dense.rows, rows);
    NIBBLE_CHECK_EQ(out->dense.cols, k);
    return;
  }
  NIBBLE_CHECK(k % kBlock == 0, absl::StrCat("k ", k, " is not a multiple of ", kBlock));
  NIBBLE_CHECK(coding->block_bits != nullptr, "block_bits is null");
  NIBBLE_CHECK(rows == 0 || (out->codes != nullptr && out->scales != nullptr), "out.codes or out.scales is null");
}

void CheckStep(const StepRows& step, const KvLayout& layout, int64_t q_heads) {
  NIBBLE_CHECK(
      step.rows >= 0 && step.sequences >= 0 && step.max_pages > 0,
      absl::StrCat("step has ", step.rows, " rows, ", step.sequences, " sequences, ", step.max_pages, " max_pages"));
  NIBBLE_CHECK(step.positions != nullptr && step.row_sequence != nullptr && step.row_begin != nullptr &&
                   step.page_tables != nullptr,
               "a table of the step is null");
  NIBBLE_CHECK(layout.kv_heads > 0 && q_heads > 0 && q_heads % layout.kv_heads == 0,
               absl::StrCat(q_heads, " query heads over ", layout.kv_heads, " KV heads"));
  NIBBLE_CHECK(
      layout.head_dim > 0 && layout.head_dim % kHeadDimMultiple == 0 && layout.head_dim <= kMaxHeadDim,
      absl::StrCat("head_dim ", layout.head_dim, ", must be a multiple of ", kHeadDimMultiple, " up to ", kMaxHeadDim));
}

void CheckPaged(const StepRows& step, const KvPages& pages, const Rows& qkv, int64_t q_heads) {
  CheckStep(step, pages.layout, q_heads);
  NIBBLE_CHECK(pages.data != nullptr && pages.num_pages > 0, absl::StrCat(pages.num_pages, " pages"));
  CheckRows(qkv, "qkv");
  NIBBLE_CHECK_EQ(qkv.rows, step.rows);
  NIBBLE_CHECK_EQ(qkv.cols, (q_heads + 2 * pages.layout.kv_heads) * pages.layout.head_dim);
}

// [N, K] of projections that are to be stacked along N.
template <typename View>
void CheckStack(std::span<const View> parts) {
  NIBBLE_CHECK(!parts.empty(), "no projections to pack");
  for (const View& part : parts) {
    NIBBLE_CHECK(part.n > 0 && part.k > 0, absl::StrCat("a projection is [", part.n, ", ", part.k, "]"));
    NIBBLE_CHECK_EQ(part.k, parts[0].k);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> Ops::PackW4(std::span<const W4View> parts) {
  CheckStack(parts);
  for (const W4View& part : parts) {
    NIBBLE_CHECK(part.qweight != nullptr && part.group_scale != nullptr && part.group_min != nullptr &&
                     part.channel_scale != nullptr,
                 "a tensor of a quantized projection is null");
    // These come from a file, so they are refused rather than fatal.
    if (part.k % kBlock != 0 || part.k > kMaxQuantizedK) {
      return absl::InvalidArgumentError(absl::StrCat("a quantized projection has ", part.k,
                                                     " input features, must be a multiple of ", kBlock, " up to ",
                                                     kMaxQuantizedK));
    }
    const int64_t groups = part.k / kBlock;
    for (int64_t i = 0; i < part.n * groups; ++i) {
      const int scale = part.group_scale[i], minimum = part.group_min[i];
      if (scale > 16 || minimum < -119 || minimum + 15 * scale > 127) {
        return absl::InvalidArgumentError(
            absl::StrCat("group ", i % groups, " of output ", i / groups, " has scale ", scale, " and minimum ", minimum,
                         "; a scale is at most 16 and all of minimum + code · scale in -119..127"));
      }
    }
  }
  return DoPackW4(parts);
}

absl::StatusOr<std::unique_ptr<Weight>> Ops::PackDense(std::span<const DenseView> parts) {
  CheckStack(parts);
  for (const DenseView& part : parts) NIBBLE_CHECK(part.data != nullptr, "data of a dense projection is null");
  return DoPackDense(parts);
}

void Ops::BeginStep(const BeginStepArgs& args) {
  CheckStep(args.step, args.layout, args.q_heads);
  begun_ = args;
  if (args.step.rows != 0) DoBeginStep(args);
}

void Ops::Embed(const EmbedArgs& args) {
  CheckRows(args.out, "out");
  if (args.out.rows == 0) return;
  NIBBLE_CHECK(args.token_ids != nullptr && args.table != nullptr, "token_ids or table is null");
  NIBBLE_CHECK_GT(args.vocab, 0);
  DoEmbed(args);
}

void Ops::AddNormQuantize(const AddNormQuantizeArgs& args) {
  CheckRows(args.residual, "residual");
  NIBBLE_CHECK(args.weight != nullptr, "weight is null");
  NIBBLE_CHECK(args.eps >= 0, absl::StrCat("eps is ", args.eps));
  NIBBLE_CHECK(args.out != nullptr, "out is null");
  CheckCoded(args.coding, args.out, args.row_index == nullptr ? args.residual.rows : args.out->rows,
             args.residual.cols);
  if (args.delta != nullptr) {
    CheckRows(*args.delta, "delta");
    NIBBLE_CHECK_EQ(args.delta->rows, args.residual.rows);
    NIBBLE_CHECK_EQ(args.delta->cols, args.residual.cols);
  }
  if (args.residual.rows == 0) {
    NIBBLE_CHECK_EQ(args.out->rows, 0);
    return;
  }
  DoAddNormQuantize(args);
}

void Ops::Quantize(const QuantizeArgs& args) {
  CheckRows(args.in, "in");
  CheckCoded(args.coding, args.out, args.in.rows, args.in.cols);
  if (args.in.rows == 0) return;
  DoQuantize(args);
}

void Ops::SiluMulQuantize(const SiluMulQuantizeArgs& args) {
  CheckRows(args.gate_up, "gate_up");
  NIBBLE_CHECK(args.gate_up.cols % 2 == 0, absl::StrCat("gate_up has ", args.gate_up.cols, " columns"));
  CheckCoded(args.coding, args.out, args.gate_up.rows, args.gate_up.cols / 2);
  if (args.gate_up.rows == 0) return;
  DoSiluMulQuantize(args);
}

void Ops::Linear(const LinearArgs& args) {
  NIBBLE_CHECK(args.weight != nullptr, "weight is null");
  CheckRows(args.out, "out");
  NIBBLE_CHECK_EQ(args.input.k, args.weight->k);
  NIBBLE_CHECK_EQ(args.out.rows, args.input.rows);
  NIBBLE_CHECK_EQ(args.out.cols, args.weight->n);
  if (args.input.rows == 0) return;
  if (args.input.codes != nullptr) {
    NIBBLE_CHECK(args.input.scales != nullptr && args.input.code_sums != nullptr,
                 "input has codes but no scales or no code_sums");
  } else {
    CheckRows(args.input.dense, "input.dense");
    NIBBLE_CHECK_EQ(args.input.dense.rows, args.input.rows);
    NIBBLE_CHECK_EQ(args.input.dense.cols, args.input.k);
  }
  DoLinear(args);
}

void Ops::RopeAppend(const RopeAppendArgs& args) {
  CheckPaged(args.step, args.pages, args.qkv, args.q_heads);
  NIBBLE_CHECK(args.cos_sin != nullptr && args.max_positions > 0,
               absl::StrCat("cos_sin of ", args.max_positions, " positions"));
  if (args.step.rows == 0) return;
  DoRopeAppend(args);
}

void Ops::Attention(const AttentionArgs& args) {
  CheckPaged(args.step, args.pages, args.qkv, args.q_heads);
  CheckRows(args.out, "out");
  NIBBLE_CHECK_EQ(args.out.rows, args.step.rows);
  NIBBLE_CHECK_EQ(args.out.cols, args.q_heads * args.pages.layout.head_dim);
  NIBBLE_CHECK(args.step == begun_.step && args.q_heads == begun_.q_heads && args.pages.layout == begun_.layout,
               "not the step, heads or layout of the last BeginStep");
  if (args.step.rows == 0) return;
  DoAttention(args);
}

void Ops::RecordHistory(const RecordHistoryArgs& args) {
  NIBBLE_CHECK(args.history != nullptr && args.vocab > 0, absl::StrCat("history of vocabulary ", args.vocab));
  NIBBLE_CHECK(args.count >= 0 && args.num_prompt >= 0 && args.num_prompt <= args.count,
               absl::StrCat(args.num_prompt, " prompt tokens of ", args.count));
  NIBBLE_CHECK(args.token_ids != nullptr || args.count == 0, "token_ids is null");
  DoRecordHistory(args);
}

void Ops::Sample(const SampleArgs& args) {
  NIBBLE_CHECK(args.rows >= 0 && args.vocab > 0, absl::StrCat(args.rows, " rows, vocabulary ", args.vocab));
  if (args.rows == 0) return;
  NIBBLE_CHECK(args.logits != nullptr && args.params != nullptr && args.token_ids != nullptr,
               "logits, params or token_ids is null");
  DoSample(args);
}

}  // namespace nibble
