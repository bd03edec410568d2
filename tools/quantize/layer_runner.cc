#include "tools/quantize/layer_runner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/rope_table.h"

namespace nibble {
namespace {

// The linears that read an input, stacked along N.
struct Stack {
  size_t first, count;
};
constexpr Stack kStacks[kLayerInputs] = {{0, 3}, {3, 1}, {4, 2}, {6, 1}};

template <typename T>
absl::StatusOr<Buffer> ToDevice(Ops* ops, const std::vector<T>& values) {
  NIBBLE_ASSIGN_OR_RETURN(Buffer buffer, ops->Allocate(values.size() * sizeof(T)));
  ops->Upload(buffer.data(), values.data(), values.size() * sizeof(T));
  return buffer;
}

std::vector<BF16> Rounded(const std::vector<float>& values) {
  std::vector<BF16> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](float x) { return ToBF16(x); });
  return out;
}

}  // namespace

struct LayerRunner::Layer {
  struct Stacked {
    std::unique_ptr<Weight> weight;
    Buffer bias, block_bits, perm;
    InputCoding coding;
  };
  Buffer input_norm, post_attention_norm;
  std::array<Stacked, kLayerInputs> stacks;
  bool quantized = false;
};

absl::StatusOr<std::unique_ptr<LayerRunner>> LayerRunner::Create(const ModelConfig& config, const Options& options) {
  if (options.window_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError("calibration windows of " + std::to_string(options.window_tokens) +
                                      " tokens, the model's context has " +
                                      std::to_string(config.max_position_embeddings));
  }
  std::unique_ptr<LayerRunner> runner(new LayerRunner(config, options));
  NIBBLE_ASSIGN_OR_RETURN(runner->ops_, CreateOps({.backend = "cpu", .threads = options.threads}));
  NIBBLE_RETURN_IF_ERROR(runner->Allocate());
  return runner;
}

LayerRunner::LayerRunner(const ModelConfig& config, const Options& options) : config_(config), options_(options) {}
LayerRunner::~LayerRunner() = default;

absl::Status LayerRunner::Allocate() {
  const int64_t rows = rows_per_run(), tokens = options_.window_tokens, windows = options_.windows_per_run;
  const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
  const int64_t h = config_.hidden_size, f = config_.intermediate_size, q = config_.num_heads * config_.head_dim;
  const int64_t qkv = q + 2 * config_.num_kv_heads * config_.head_dim, widest = std::max({h, q, f});

  std::vector<int32_t> positions, row_sequence, row_begin, tables;
  for (int64_t w = 0; w < windows; ++w) {
    row_begin.push_back(static_cast<int32_t>(w * tokens));
    for (int64_t t = 0; t < tokens; ++t) {
      positions.push_back(static_cast<int32_t>(t));
      row_sequence.push_back(static_cast<int32_t>(w));
    }
    for (int64_t p = 0; p < pages; ++p) tables.push_back(static_cast<int32_t>(w * pages + p));
  }
  row_begin.push_back(static_cast<int32_t>(rows));
  NIBBLE_ASSIGN_OR_RETURN(positions_, ToDevice(ops_.get(), positions));
  NIBBLE_ASSIGN_OR_RETURN(row_sequence_, ToDevice(ops_.get(), row_sequence));
  NIBBLE_ASSIGN_OR_RETURN(row_begin_, ToDevice(ops_.get(), row_begin));
  NIBBLE_ASSIGN_OR_RETURN(page_tables_, ToDevice(ops_.get(), tables));
  NIBBLE_ASSIGN_OR_RETURN(rope_, ToDevice(ops_.get(), RopeTable(config_)));

  // Pages of f32 are the larger format.
  const KvLayout layout = {.format = KvFormat::kF32, .kv_heads = config_.num_kv_heads, .head_dim = config_.head_dim};
  const struct {
    Buffer* buffer;
    int64_t bytes;
  } buffers[] = {{&residual_, rows * h * 4},    {&delta_, rows * h * 4},
                 {&qkv_, rows * qkv * 4},       {&attention_, rows * q * 4},
                 {&gate_up_, rows * 2 * f * 4}, {&dense_, rows * widest * 4},
                 {&codes_, rows * widest},      {&scales_, rows * 4},
                 {&code_sums_, rows * 4},       {&pages_, windows * pages * layout.page_bytes()}};
  for (const auto& [buffer, bytes] : buffers) {
    NIBBLE_ASSIGN_OR_RETURN(*buffer, ops_->Allocate(static_cast<size_t>(bytes)));
  }
  return absl::OkStatus();
}

absl::Status LayerRunner::LoadNorms(const DenseLayer& layer) {
  layer_ = std::make_unique<Layer>();
  NIBBLE_ASSIGN_OR_RETURN(layer_->input_norm, ToDevice(ops_.get(), Rounded(layer.input_norm)));
  NIBBLE_ASSIGN_OR_RETURN(layer_->post_attention_norm, ToDevice(ops_.get(), Rounded(layer.post_attention_norm)));
  for (size_t i = 0; i < kLayerInputs; ++i) {
    std::vector<float> bias;
    bool any = false;
    for (size_t j = kStacks[i].first; j < kStacks[i].first + kStacks[i].count; ++j) {
      const DenseLinear& linear = layer.linears[j];
      any = any || !linear.bias.empty();
      const size_t begin = bias.size();
      bias.insert(bias.end(), linear.bias.begin(), linear.bias.end());
      bias.resize(begin + static_cast<size_t>(linear.shape.n), 0.0f);
    }
    if (any) {
      NIBBLE_ASSIGN_OR_RETURN(layer_->stacks[i].bias, ToDevice(ops_.get(), bias));
    }
    layer_->stacks[i].coding.k = layer.linears[kStacks[i].first].shape.k;
  }
  return absl::OkStatus();
}

absl::Status LayerRunner::LoadDense(const DenseLayer& layer, int64_t down_hadamard) {
  NIBBLE_RETURN_IF_ERROR(LoadNorms(layer));
  for (size_t i = 0; i < kLayerInputs; ++i) {
    std::vector<std::vector<BF16>> rounded;
    std::vector<DenseView> views;
    for (size_t j = kStacks[i].first; j < kStacks[i].first + kStacks[i].count; ++j) {
      const DenseLinear& linear = layer.linears[j];
      rounded.push_back(Rounded(linear.weight));
      views.push_back({.n = linear.shape.n, .k = linear.shape.k, .data = rounded.back().data()});
    }
    NIBBLE_ASSIGN_OR_RETURN(layer_->stacks[i].weight, ops_->PackDense(views));
  }
  layer_->stacks[static_cast<size_t>(LayerInput::kDown)].coding.hadamard = down_hadamard;
  return absl::OkStatus();
}

absl::Status LayerRunner::LoadQuantized(const DenseLayer& norms, std::span<const LinearTensors> linears,
                                        int64_t down_hadamard) {
  NIBBLE_RETURN_IF_ERROR(LoadNorms(norms));
  layer_->quantized = true;
  for (size_t i = 0; i < kLayerInputs; ++i) {
    std::vector<W4View> views;
    for (const LinearTensors& part : linears.subspan(kStacks[i].first, kStacks[i].count)) {
      views.push_back({.n = part.n,
                       .k = part.k,
                       .qweight = part.qweight.data(),
                       .group_scale = part.group_scale.data(),
                       .group_min = part.group_min.data(),
                       .channel_scale = part.channel_scale.data()});
    }
    Layer::Stacked& stack = layer_->stacks[i];
    const LinearTensors& first = linears[kStacks[i].first];
    NIBBLE_ASSIGN_OR_RETURN(stack.weight, ops_->PackW4(views));
    NIBBLE_ASSIGN_OR_RETURN(stack.block_bits, ToDevice(ops_.get(), first.block_bits));
    stack.coding.quantized = true;
    stack.coding.block_bits = stack.block_bits.as<uint8_t>();
    if (first.input_perm.empty()) continue;
    NIBBLE_ASSIGN_OR_RETURN(stack.perm, ToDevice(ops_.get(), first.input_perm));
    stack.coding.perm = stack.perm.as<int32_t>();
  }
  layer_->stacks[static_cast<size_t>(LayerInput::kDown)].coding.hadamard = down_hadamard;
  return absl::OkStatus();
}

LinearInput LayerRunner::Input(LayerInput which, int64_t rows) {
  const InputCoding& coding = layer_->stacks[static_cast<size_t>(which)].coding;
  LinearInput input = {.rows = rows, .k = coding.k};
  if (coding.quantized) {
    input.codes = codes_.as<int8_t>();
    input.scales = scales_.as<float>();
    input.code_sums = code_sums_.as<int32_t>();
  } else {
    input.dense = {.data = dense_.data(), .dtype = DType::kF32, .rows = rows, .cols = coding.k};
  }
  return input;
}

void LayerRunner::Linear(LayerInput which, const LinearInput& input, const Rows& out) {
  const Layer::Stacked& stack = layer_->stacks[static_cast<size_t>(which)];
  ops_->Linear({.input = input, .weight = stack.weight.get(), .bias = stack.bias.as<float>(), .out = out});
}

absl::Status LayerRunner::Tap(const LayerTaps& taps, LayerInput which, const LinearInput& input) {
  if (layer_->quantized || !taps.input) return absl::OkStatus();
  host_.resize(static_cast<size_t>(input.rows * input.k));
  ops_->Download(host_.data(), input.dense.data, host_.size() * sizeof(float));
  return taps.input(which, host_);
}

void LayerRunner::TapKeys(const LayerTaps& taps, int64_t rows) {
  if (layer_->quantized || !taps.keys) return;
  const int64_t heads = config_.num_kv_heads, d = config_.head_dim, width = heads * d;
  const int64_t tokens = options_.window_tokens, pages = (tokens + kPageTokens - 1) / kPageTokens;
  const KvLayout layout = {.format = KvFormat::kF32, .kv_heads = heads, .head_dim = d};
  std::vector<uint8_t> memory(static_cast<size_t>(rows / tokens * pages * layout.page_bytes()));
  ops_->Download(memory.data(), pages_.data(), memory.size());
  host_.resize(static_cast<size_t>(rows * width));
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t page = t / tokens * pages + t % tokens / kPageTokens, slot = t % tokens % kPageTokens;
    for (int64_t head = 0; head < heads; ++head) {
      const float* keys =
          reinterpret_cast<const float*>(memory.data() + page * layout.page_bytes() + head * layout.head_bytes());
      std::copy_n(keys + slot * d, d, host_.data() + t * width + head * d);
    }
  }
  taps.keys(host_);
}

absl::Status LayerRunner::Run(std::span<float> hidden, const LayerTaps& taps) {
  NIBBLE_CHECK(layer_ != nullptr, "no layer is loaded");
  const int64_t h = config_.hidden_size, d = config_.head_dim, rows = static_cast<int64_t>(hidden.size()) / h;
  NIBBLE_CHECK(rows > 0 && rows <= rows_per_run() && rows % options_.window_tokens == 0);
  const auto activations = [&](const Buffer& buffer, int64_t cols) {
    return Rows{.data = buffer.data(), .dtype = DType::kF32, .rows = rows, .cols = cols};
  };
  const Rows residual = activations(residual_, h), delta = activations(delta_, h);
  const Rows qkv = activations(qkv_, (config_.num_heads + 2 * config_.num_kv_heads) * d);
  const Rows attention = activations(attention_, config_.num_heads * d);
  const Rows gate_up = activations(gate_up_, 2 * config_.intermediate_size);
  const int64_t pages_per_window = (options_.window_tokens + kPageTokens - 1) / kPageTokens;
  const StepRows step = {.rows = rows,
                         .sequences = rows / options_.window_tokens,
                         .positions = positions_.as<int32_t>(),
                         .row_sequence = row_sequence_.as<int32_t>(),
                         .row_begin = row_begin_.as<int32_t>(),
                         .page_tables = page_tables_.as<int32_t>(),
                         .max_pages = pages_per_window};
  const KvPages pages = {.data = pages_.as<uint8_t>(),
                         .num_pages = options_.windows_per_run * pages_per_window,
                         .layout = {.format = layer_->quantized ? KvFormat::kKV4 : KvFormat::kF32,
                                    .kv_heads = config_.num_kv_heads,
                                    .head_dim = d}};
  const float eps = static_cast<float>(config_.rms_norm_eps);
  const auto coding = [&](LayerInput which) { return &layer_->stacks[static_cast<size_t>(which)].coding; };

  ops_->Upload(residual_.data(), hidden.data(), hidden.size_bytes());
  ops_->BeginStep({.step = step, .q_heads = config_.num_heads, .layout = pages.layout});
  LinearInput x = Input(LayerInput::kQkv, rows);
  ops_->AddNormQuantize({.residual = residual,
                         .weight = layer_->input_norm.as<BF16>(),
                         .eps = eps,
                         .coding = coding(LayerInput::kQkv),
                         .out = &x});
  NIBBLE_RETURN_IF_ERROR(Tap(taps, LayerInput::kQkv, x));
  Linear(LayerInput::kQkv, x, qkv);
  ops_->RopeAppend({.step = step,
                    .qkv = qkv,
                    .q_heads = config_.num_heads,
                    .cos_sin = rope_.as<float>(),
                    .max_positions = config_.max_position_embeddings,
                    .pages = pages});
  TapKeys(taps, rows);
  ops_->Attention({.step = step,
                   .qkv = qkv,
                   .q_heads = config_.num_heads,
                   .pages = pages,
                   .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d))),
                   .out = attention});
  x = Input(LayerInput::kO, rows);
  ops_->Quantize({.in = attention, .coding = coding(LayerInput::kO), .out = &x});
  NIBBLE_RETURN_IF_ERROR(Tap(taps, LayerInput::kO, x));
  Linear(LayerInput::kO, x, delta);

  x = Input(LayerInput::kGateUp, rows);
  ops_->AddNormQuantize({.residual = residual,
                         .delta = &delta,
                         .weight = layer_->post_attention_norm.as<BF16>(),
                         .eps = eps,
                         .coding = coding(LayerInput::kGateUp),
                         .out = &x});
  NIBBLE_RETURN_IF_ERROR(Tap(taps, LayerInput::kGateUp, x));
  Linear(LayerInput::kGateUp, x, gate_up);
  x = Input(LayerInput::kDown, rows);
  ops_->SiluMulQuantize({.gate_up = gate_up, .coding = coding(LayerInput::kDown), .out = &x});
  NIBBLE_RETURN_IF_ERROR(Tap(taps, LayerInput::kDown, x));
  Linear(LayerInput::kDown, x, delta);

  ops_->Download(hidden.data(), residual.data, hidden.size_bytes());
  host_.resize(hidden.size());
  ops_->Download(host_.data(), delta.data, hidden.size_bytes());
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += host_[i];
  return ops_->Synchronize();
}

}  // namespace nibble
