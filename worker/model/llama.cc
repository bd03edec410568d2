#include "worker/model/llama.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {

absl::StatusOr<std::unique_ptr<Llama>> Llama::Create(const Model& model, Communicator& communicator, const KvPool& pool,
                                                     const Limits& limits) {
  auto llama = std::unique_ptr<Llama>(new Llama(model, communicator, pool, limits));
  NIBBLE_RETURN_IF_ERROR(llama->Allocate());
  return llama;
}

Llama::Llama(const Model& model, Communicator& communicator, const KvPool& pool, const Limits& limits)
    : model_(model), ops_(*model.ops), communicator_(communicator), pool_(pool), limits_(limits) {}

absl::Status Llama::Forward(const Input& input) {
  const ModelConfig& config = model_.config;
  const StepRows& step = input.step;
  const int64_t t = step.rows, d = config.head_dim;
  NIBBLE_CHECK_LE(t, limits_.rows);
  const float eps = static_cast<float>(config.rms_norm_eps);
  const float attention_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  const Rows residual = Activations(residual_, t, config.hidden_size);
  const Rows delta = Activations(delta_, t, config.hidden_size);
  const Rows qkv = Activations(qkv_, t, (model_.q_heads + 2 * model_.kv_heads) * d);
  const Rows attention = Activations(attention_, t, model_.q_heads * d);
  const Rows gate_up = Activations(gate_up_, t, 2 * model_.intermediate_size);

  ops_.BeginStep({.step = step, .q_heads = model_.q_heads, .layout = pool_.layout()});
  ops_.Embed({.token_ids = input.token_ids,
              .slot_tokens = input.slot_tokens,
              .table = model_.embedding.as<BF16>(),
              .vocab = config.vocab_size,
              .out = residual});
  const Rows* pending = nullptr;  // delta of the layer before
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerWeights& w = model_.layers[static_cast<size_t>(i)];
    const KvPages pages = pool_.layer(i);

    LinearInput* x = Coded(w.qkv_input, t);
    ops_.AddNormQuantize({.residual = residual,
                          .delta = pending,
                          .weight = w.input_norm.as<BF16>(),
                          .eps = eps,
                          .coding = &w.qkv_input.coding,
                          .out = x});
    Linear(x, w.qkv, qkv);
    ops_.RopeAppend({.step = step,
                     .qkv = qkv,
                     .q_heads = model_.q_heads,
                     .cos_sin = model_.rope.as<float>(),
                     .max_positions = config.max_position_embeddings,
                     .pages = pages});
    ops_.Attention({.step = step,
                    .qkv = qkv,
                    .q_heads = model_.q_heads,
                    .pages = pages,
                    .scale = attention_scale,
                    .out = attention});
    x = Coded(w.o_input, t);
    ops_.Quantize({.in = attention, .coding = &w.o_input.coding, .out = x});
    Linear(x, w.o, delta);
    NIBBLE_RETURN_IF_ERROR(AllReduce(delta));

    x = Coded(w.gate_up_input, t);
    ops_.AddNormQuantize({.residual = residual,
                          .delta = &delta,
                          .weight = w.post_attention_norm.as<BF16>(),
                          .eps = eps,
                          .coding = &w.gate_up_input.coding,
                          .out = x});
    Linear(x, w.gate_up, gate_up);
    x = Coded(w.down_input, t);
    ops_.SiluMulQuantize({.gate_up = gate_up, .coding = &w.down_input.coding, .out = x});
    Linear(x, w.down, delta);
    NIBBLE_RETURN_IF_ERROR(AllReduce(delta));
    pending = &delta;
  }
  rows_ = t;
  delta_pending_ = true;
  return absl::OkStatus();
}

absl::StatusOr<const float*> Llama::Logits(const int32_t* row_index, int64_t count) {
  const ModelConfig& config = model_.config;
  NIBBLE_CHECK_LE(count, limits_.logit_rows);
  const Rows delta = Activations(delta_, rows_, config.hidden_size);
  const bool cut = model_.head_columns < config.vocab_size;

  LinearInput* x = Coded(model_.head_input, count);
  ops_.AddNormQuantize({.residual = Activations(residual_, rows_, config.hidden_size),
                        .delta = std::exchange(delta_pending_, false) ? &delta : nullptr,
                        .weight = model_.final_norm.as<BF16>(),
                        .eps = static_cast<float>(config.rms_norm_eps),
                        .row_index = row_index,
                        .coding = &model_.head_input.coding,
                        .out = x});
  const Buffer& out = cut ? shard_logits_ : logits_;
  Linear(x, model_.head, {.data = out.data(), .dtype = DType::kF32, .rows = count, .cols = model_.head_columns});
  if (cut) {
    const auto start = std::chrono::steady_clock::now();
    const absl::Status status = communicator_.AllGather(
        shard_logits_.data(), count, static_cast<size_t>(model_.head_columns) * sizeof(float), logits_.data());
    collective_time_ += std::chrono::steady_clock::now() - start;
    NIBBLE_RETURN_IF_ERROR(status);
  }
  return logits_.as<float>();
}

absl::Status Llama::AllReduce(const Rows& rows) {
  if (communicator_.size() == 1) return absl::OkStatus();
  const auto start = std::chrono::steady_clock::now();
  const absl::Status status = communicator_.AllReduceSum(rows);
  collective_time_ += std::chrono::steady_clock::now() - start;
  return status;
}

void Llama::Linear(const LinearInput* input, const FusedLinear& linear, const Rows& out) {
  ops_.Linear({.input = *input, .weight = linear.weight.get(), .bias = linear.bias.as<float>(), .out = out});
}

Rows Llama::Activations(const Buffer& buffer, int64_t rows, int64_t cols) const {
  return {.data = buffer.data(), .dtype = model_.activations, .rows = rows, .cols = cols};
}

LinearInput* Llama::Coded(const CodedInput& input, int64_t rows) {
  coded_ = {.rows = rows, .k = input.coding.k};
  if (input.coding.quantized) {
    coded_.codes = codes_.as<int8_t>();
    coded_.scales = scales_.as<float>();
    coded_.code_sums = code_sums_.as<int32_t>();
    coded_.exponents = exponents_.as<uint8_t>();
  } else {
    coded_.dense = Activations(dense_, rows, input.coding.k);
  }
  return &coded_;
}

absl::Status Llama::Allocate() {
  const ModelConfig& config = model_.config;
  const int64_t t = limits_.rows, h = config.hidden_size, d = config.head_dim;
  const int64_t element = SizeOf(model_.activations);
  const int64_t widest = std::max({h, model_.q_heads * d, model_.intermediate_size});
  const bool quantized = config.quantization != Quantization::kBF16;
  const struct {
    Buffer* buffer;
    int64_t bytes;
  } buffers[] = {
      {&residual_, t * h * element},
      {&delta_, t * h * element},
      {&qkv_, t * (model_.q_heads + 2 * model_.kv_heads) * d * element},
      {&attention_, t * model_.q_heads * d * element},
      {&gate_up_, t * 2 * model_.intermediate_size * element},
      {&dense_, (quantized ? limits_.logit_rows * h : t * widest) * element},  // lm_head is dense in every checkpoint
      {&codes_, quantized ? t * widest : 0},
      {&scales_, quantized ? t * static_cast<int64_t>(sizeof(float)) : 0},
      {&code_sums_, quantized ? t * static_cast<int64_t>(sizeof(int32_t)) : 0},
      {&exponents_, quantized ? t * widest / kBlock : 0},
      {&shard_logits_, model_.head_columns < config.vocab_size
                           ? limits_.logit_rows * model_.head_columns * static_cast<int64_t>(sizeof(float))
                           : 0},
      {&logits_, limits_.logit_rows * config.vocab_size * static_cast<int64_t>(sizeof(float))},
  };
  for (const auto& [buffer, bytes] : buffers) {
    if (bytes == 0) continue;
    NIBBLE_ASSIGN_OR_RETURN(*buffer, ops_.Allocate(static_cast<size_t>(bytes)));
  }
  return absl::OkStatus();
}

}  // namespace nibble
