// Speed of single operators on the shapes of the bundled model and of larger ones. Prints products per second (items)
// and bytes of weights or pages per second.
//   nibble_op_benchmark --benchmark_filter=W4
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "common/base/check.h"
#include "kernels/cpu/cpu_ops.h"

namespace nibble {
namespace {

std::unique_ptr<Ops> MakeOps(int64_t isa) {
  const std::vector<Isa> isas = AvailableIsas();
  if (isa >= static_cast<int64_t>(isas.size())) return nullptr;
  return CreateCpuOps({.threads = 1, .isa = isas[isas.size() - 1 - isa]});
}

template <typename T>
std::vector<T> RandomBytes(int64_t count) {
  std::mt19937 random(1);
  std::vector<T> values(count);
  for (T& x : values) x = static_cast<T>(random());
  return values;
}
std::vector<BF16> RandomBF16(int64_t count) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<BF16> values(count);
  for (BF16& x : values) x = ToBF16(normal(random));
  return values;
}
std::vector<float> RandomFloats(int64_t count) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

// Arguments: instruction set (0 = fastest of this machine), rows, N, K.
void BM_W4Linear(benchmark::State& state) {
  const auto ops = MakeOps(state.range(0));
  if (ops == nullptr) return state.SkipWithError("not on this machine");
  state.SetLabel(ops->Describe());
  const int64_t rows = state.range(1), n = state.range(2), k = state.range(3);
  const auto qweight = RandomBytes<uint8_t>(n * k / 2);
  const std::vector<uint8_t> scale(n * k / kBlock, 7);
  const std::vector<int8_t> minimum(n * k / kBlock, -50);
  const std::vector<float> channel(n, 0.01f);
  const W4View view = {n, k, qweight.data(), scale.data(), minimum.data(), channel.data()};
  auto weight = ops->PackW4({&view, 1});
  NIBBLE_CHECK(weight.ok());
  auto codes = RandomBytes<int8_t>(rows * k);
  std::vector<float> scales(rows, 0.1f);
  std::vector<int32_t> code_sums(rows);
  std::vector<BF16> out(rows * n);
  for (auto _ : state) {
    ops->Linear({.input = {.rows = rows,
                           .k = k,
                           .codes = codes.data(),
                           .scales = scales.data(),
                           .code_sums = code_sums.data()},
                 .weight = weight->get(),
                 .out = {out.data(), DType::kBF16, rows, n}});
    benchmark::DoNotOptimize(out.data());
  }
  state.SetItemsProcessed(state.iterations() * rows * n * k);
  state.SetBytesProcessed(state.iterations() * n * k / 2);
}
BENCHMARK(BM_W4Linear)
    ->ArgsProduct({{0}, {1, 2, 4, 8, 16, 32, 64, 256}, {1536}, {512}})
    ->ArgsProduct({{0}, {1, 32, 256}, {512}, {768}})
    ->ArgsProduct({{0}, {1, 32, 256}, {4096}, {4096}})
    ->ArgsProduct({{1, 2}, {1, 32, 256}, {1536}, {512}});

void BM_DenseLinear(benchmark::State& state) {
  const auto ops = MakeOps(state.range(0));
  if (ops == nullptr) return state.SkipWithError("not on this machine");
  state.SetLabel(ops->Describe());
  const int64_t rows = state.range(1), n = state.range(2), k = state.range(3);
  const auto w = RandomBF16(n * k);
  const DenseView view = {n, k, w.data()};
  auto weight = ops->PackDense({&view, 1});
  NIBBLE_CHECK(weight.ok());
  auto x = RandomFloats(rows * k);
  std::vector<float> out(rows * n);
  for (auto _ : state) {
    ops->Linear({.input = {.rows = rows, .k = k, .dense = {x.data(), DType::kF32, rows, k}},
                 .weight = weight->get(),
                 .out = {out.data(), DType::kF32, rows, n}});
    benchmark::DoNotOptimize(out.data());
  }
  state.SetItemsProcessed(state.iterations() * rows * n * k);
  state.SetBytesProcessed(state.iterations() * n * k * 2);
}
BENCHMARK(BM_DenseLinear)
    ->ArgsProduct({{0}, {1, 2, 8, 12, 32, 64, 512}, {2048}, {512}})
    ->ArgsProduct({{0}, {512}, {512}, {1536}})
    ->ArgsProduct({{1, 2}, {1, 64}, {2048}, {512}});

// Arguments: sequences, rows of each, context before them. 2 query heads, 1 KV head of 128: the bundled model at TP=2.
void BM_Attention(benchmark::State& state) {
  const auto ops = MakeOps(0);
  const int64_t sequences = state.range(0), added = state.range(1), cached = state.range(2);
  const int64_t rows = sequences * added, max_pages = (cached + added + kPageTokens - 1) / kPageTokens;
  KvLayout layout = {state.range(3) == 0 ? KvFormat::kKV4 : KvFormat::kF32, 1, 128};
  std::vector<uint8_t> pages(sequences * max_pages * layout.page_bytes());
  std::vector<int32_t> positions, row_sequence, row_begin = {0}, tables;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t i = 0; i < added; ++i) {
      positions.push_back(static_cast<int32_t>(cached + i));
      row_sequence.push_back(static_cast<int32_t>(s));
    }
    row_begin.push_back(static_cast<int32_t>(positions.size()));
    for (int64_t i = 0; i < max_pages; ++i) tables.push_back(static_cast<int32_t>(s * max_pages + i));
  }
  auto qkv = RandomBF16(rows * 4 * 128);
  std::vector<BF16> out(rows * 2 * 128);
  const StepRows step = {rows,          sequences, positions.data(), row_sequence.data(), row_begin.data(),
                         tables.data(), max_pages};
  for (auto _ : state) {
    ops->BeginStep({.step = step, .q_heads = 2, .layout = layout});
    ops->Attention({.step = step,
                    .qkv = {qkv.data(), DType::kBF16, rows, 4 * 128},
                    .q_heads = 2,
                    .pages = {pages.data(), sequences * max_pages, layout},
                    .scale = 0.088f,
                    .out = {out.data(), DType::kBF16, rows, 2 * 128}});
    benchmark::DoNotOptimize(out.data());
  }
  state.SetItemsProcessed(state.iterations() * rows * (cached + added / 2) * 2 * 2 * 128);
  state.SetBytesProcessed(state.iterations() * sequences * (cached + added) * layout.head_bytes() / kPageTokens);
}
BENCHMARK(BM_Attention)
    ->ArgsProduct({{1, 32}, {1}, {100, 500, 4000}, {0}})
    ->ArgsProduct({{1}, {512}, {0}, {0, 1}})
    ->ArgsProduct({{1}, {64}, {500}, {0}});

void BM_AddNormQuantize(benchmark::State& state) {
  const auto ops = MakeOps(0);
  const int64_t rows = state.range(0), h = 512;
  auto residual = RandomBF16(rows * h), delta = RandomBF16(rows * h), weight = RandomBF16(h);
  const std::vector<uint8_t> bits = {8, 4, 4, 4};
  const InputCoding coding = {.k = h, .quantized = true, .block_bits = bits.data()};
  std::vector<int8_t> codes(rows * h);
  std::vector<float> scales(rows);
  LinearInput out = {.rows = rows, .k = h, .codes = codes.data(), .scales = scales.data()};
  const Rows d = {delta.data(), DType::kBF16, rows, h};
  for (auto _ : state) {
    ops->AddNormQuantize({.residual = {residual.data(), DType::kBF16, rows, h},
                          .delta = &d,
                          .weight = weight.data(),
                          .eps = 1e-5f,
                          .coding = &coding,
                          .out = &out});
  }
  state.SetItemsProcessed(state.iterations() * rows * h);
}
BENCHMARK(BM_AddNormQuantize)->Arg(1)->Arg(32);

void BM_SiluMulQuantize(benchmark::State& state) {
  const auto ops = MakeOps(0);
  const int64_t rows = state.range(0), f = 768;
  auto gate_up = RandomBF16(rows * 2 * f);
  const std::vector<uint8_t> bits = {8, 4, 4, 4, 4, 4};
  const InputCoding coding = {.k = f, .quantized = true, .block_bits = bits.data()};
  std::vector<int8_t> codes(rows * f);
  std::vector<float> scales(rows);
  LinearInput out = {.rows = rows, .k = f, .codes = codes.data(), .scales = scales.data()};
  for (auto _ : state) {
    ops->SiluMulQuantize({.gate_up = {gate_up.data(), DType::kBF16, rows, 2 * f}, .coding = &coding, .out = &out});
  }
  state.SetItemsProcessed(state.iterations() * rows * f);
}
BENCHMARK(BM_SiluMulQuantize)->Arg(1)->Arg(32);

void BM_RopeAppend(benchmark::State& state) {
  const auto ops = MakeOps(0);
  const int64_t rows = state.range(0);
  const KvLayout layout = {KvFormat::kKV4, 1, 128};
  std::vector<uint8_t> pages(rows * layout.page_bytes());
  std::vector<int32_t> positions(rows, 5), row_sequence, row_begin = {0}, tables;
  for (int32_t i = 0; i < rows; ++i) {
    row_sequence.push_back(i);
    row_begin.push_back(i + 1);
    tables.push_back(i);
  }
  const auto qkv_values = RandomBF16(rows * 4 * 128);
  auto qkv = qkv_values;
  const auto cos_sin = RandomFloats(64 * 128);
  const StepRows step = {rows, rows, positions.data(), row_sequence.data(), row_begin.data(), tables.data(), 1};
  for (auto _ : state) {
    qkv = qkv_values;
    ops->RopeAppend({.step = step,
                     .qkv = {qkv.data(), DType::kBF16, rows, 4 * 128},
                     .q_heads = 2,
                     .cos_sin = cos_sin.data(),
                     .max_positions = 64,
                     .pages = {pages.data(), rows, layout}});
  }
  state.SetItemsProcessed(state.iterations() * rows);
}
BENCHMARK(BM_RopeAppend)->Arg(1)->Arg(32);

// Arguments: rows, vocabulary, kind: greedy, temperature, top-k, top-p, greedy with 5 log-probabilities.
void BM_Sample(benchmark::State& state) {
  const auto ops = MakeOps(0);
  const int64_t rows = state.range(0), vocab = state.range(1);
  const auto logits = RandomFloats(rows * vocab);
  SampleRow row;
  if (state.range(2) >= 1 && state.range(2) <= 3) row.temperature = 0.8f;
  if (state.range(2) == 2) row.top_k = 40;
  if (state.range(2) == 3) row.top_p = 0.95f;
  if (state.range(2) == 4) row.num_logprobs = 5;
  const std::vector<SampleRow> params(rows, row);
  std::vector<int32_t> ids(rows), top_ids(rows * kMaxTopLogprobs);
  std::vector<float> logprobs(rows), top_logprobs(rows * kMaxTopLogprobs);
  for (auto _ : state) {
    ops->Sample({.logits = logits.data(),
                 .rows = rows,
                 .vocab = vocab,
                 .params = params.data(),
                 .token_ids = ids.data(),
                 .logprobs = logprobs.data(),
                 .top_ids = top_ids.data(),
                 .top_logprobs = top_logprobs.data()});
  }
  static constexpr const char* kKinds[] = {"greedy", "temperature", "top_k", "top_p", "logprobs"};
  state.SetLabel(kKinds[state.range(2)]);
  state.SetItemsProcessed(state.iterations() * rows * vocab);
}
BENCHMARK(BM_Sample)->ArgsProduct({{1}, {4096, 128256}, {0, 1, 2, 3, 4}});

// One rank's decode step of the bundled model at TP=2, without the collectives: 4 layers, H 512, F 768 of 1536, 2 query
// heads and 1 KV head of 128, 2048 of 4096 logits, greedy. Arguments: sequences, context.
class DecodeStep {
 public:
  DecodeStep(int64_t sequences, int64_t context)
      : ops_(MakeOps(0)), rows_(sequences), max_pages_(context / kPageTokens + 1) {
    for (int layer = 0; layer < kLayers; ++layer) {
      layers_.push_back({PackW4(4 * kD, kH), PackW4(kH, 2 * kD), PackW4(2 * kF, kH), PackW4(kH, kF),
                         std::vector<uint8_t>(rows_ * max_pages_ * kLayout.page_bytes())});
    }
    const auto head = RandomBF16(kLogits * kH);
    const DenseView view = {kLogits, kH, head.data()};
    head_ = *ops_->PackDense({&view, 1});
    positions_.assign(rows_, static_cast<int32_t>(context));
    row_begin_ = {0};
    for (int32_t i = 0; i < rows_; ++i) {
      row_sequence_.push_back(i);
      row_begin_.push_back(i + 1);
      for (int64_t page = 0; page < max_pages_; ++page) tables_.push_back(static_cast<int32_t>(i * max_pages_ + page));
    }
    cos_sin_ = RandomFloats((context + 1) * kD);
  }

  void Run() {
    const StepRows step = {rows_,          rows_,     positions_.data(), row_sequence_.data(), row_begin_.data(),
                           tables_.data(), max_pages_};
    const Rows hidden = Bf16(hidden_, kH), delta = Bf16(delta_, kH), qkv = Bf16(qkv_, 4 * kD);
    const Rows mixed = Bf16(mixed_, 2 * kD), gate_up = Bf16(gate_up_, 2 * kF);
    ops_->BeginStep({.step = step, .q_heads = 2, .layout = kLayout});
    for (Layer& layer : layers_) {
      const KvPages pages = {layer.pages.data(), rows_ * max_pages_, kLayout};
      LinearInput x = Coded(kH);
      Norm(hidden, &delta, kH, &x);
      ops_->Linear({.input = x, .weight = layer.qkv.get(), .out = qkv});
      ops_->RopeAppend({.step = step,
                        .qkv = qkv,
                        .q_heads = 2,
                        .cos_sin = cos_sin_.data(),
                        .max_positions = positions_[0] + 1,
                        .pages = pages});
      ops_->Attention({.step = step, .qkv = qkv, .q_heads = 2, .pages = pages, .scale = 0.088f, .out = mixed});
      x = Coded(2 * kD);
      const InputCoding o_coding = {.k = 2 * kD, .quantized = true, .block_bits = kBits};
      ops_->Quantize({.in = mixed, .coding = &o_coding, .out = &x});
      ops_->Linear({.input = x, .weight = layer.o.get(), .out = delta});
      x = Coded(kH);
      Norm(hidden, &delta, kH, &x);
      ops_->Linear({.input = x, .weight = layer.gate_up.get(), .out = gate_up});
      x = Coded(kF);
      const InputCoding down_coding = {.k = kF, .quantized = true, .block_bits = kBits};
      ops_->SiluMulQuantize({.gate_up = gate_up, .coding = &down_coding, .out = &x});
      ops_->Linear({.input = x, .weight = layer.down.get(), .out = delta});
    }
    const InputCoding dense = {.k = kH};
    LinearInput x = {.rows = rows_, .k = kH, .dense = Bf16(normed_, kH)};
    ops_->AddNormQuantize(
        {.residual = hidden, .delta = &delta, .weight = norm_.data(), .eps = 1e-5f, .coding = &dense, .out = &x});
    logits_.resize(rows_ * kLogits);
    ops_->Linear({.input = x, .weight = head_.get(), .out = {logits_.data(), DType::kF32, rows_, kLogits}});
    ids_.resize(rows_);
    params_.resize(rows_);
    ops_->Sample({.logits = logits_.data(),
                  .rows = rows_,
                  .vocab = kLogits,
                  .params = params_.data(),
                  .token_ids = ids_.data()});
  }

 private:
  static constexpr int kLayers = 4;
  static constexpr int64_t kH = 512, kF = 768, kD = 128, kLogits = 2048;
  static constexpr uint8_t kBits[] = {8, 4, 4, 4, 4, 4};
  static constexpr KvLayout kLayout = {KvFormat::kKV4, 1, kD};

  struct Layer {
    std::unique_ptr<Weight> qkv, o, gate_up, down;
    std::vector<uint8_t> pages;
  };

  std::unique_ptr<Weight> PackW4(int64_t n, int64_t k) {
    const auto qweight = RandomBytes<uint8_t>(n * k / 2);
    const std::vector<uint8_t> scale(n * k / kBlock, 7);
    const std::vector<int8_t> minimum(n * k / kBlock, -50);
    const std::vector<float> channel(n, 0.0005f);
    const W4View view = {n, k, qweight.data(), scale.data(), minimum.data(), channel.data()};
    return *ops_->PackW4({&view, 1});
  }
  Rows Bf16(std::vector<BF16>& values, int64_t cols) {
    if (values.empty()) values = RandomBF16(rows_ * cols);
    return {values.data(), DType::kBF16, rows_, cols};
  }
  LinearInput Coded(int64_t k) {
    codes_.resize(rows_ * kF);
    scales_.resize(rows_);
    code_sums_.resize(rows_);
    return {.rows = rows_,
            .k = k,
            .codes = codes_.data(),
            .scales = scales_.data(),
            .code_sums = code_sums_.data()};
  }
  void Norm(const Rows& hidden, const Rows* delta, int64_t k, LinearInput* out) {
    const InputCoding coding = {.k = k, .quantized = true, .block_bits = kBits};
    ops_->AddNormQuantize(
        {.residual = hidden, .delta = delta, .weight = norm_.data(), .eps = 1e-5f, .coding = &coding, .out = out});
  }

  std::unique_ptr<Ops> ops_;
  int64_t rows_, max_pages_;
  std::vector<Layer> layers_;
  std::unique_ptr<Weight> head_;
  std::vector<BF16> norm_ = std::vector<BF16>(kH, ToBF16(0.1f));
  std::vector<BF16> hidden_, delta_, qkv_, mixed_, gate_up_, normed_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_, logits_, cos_sin_;
  std::vector<int32_t> code_sums_;
  std::vector<int32_t> positions_, row_sequence_, row_begin_, tables_, ids_;
  std::vector<SampleRow> params_;
};

void BM_DecodeStep(benchmark::State& state) {
  DecodeStep step(state.range(0), state.range(1));
  for (auto _ : state) step.Run();
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_DecodeStep)->ArgsProduct({{1, 8, 32}, {100, 500}})->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace nibble

BENCHMARK_MAIN();
