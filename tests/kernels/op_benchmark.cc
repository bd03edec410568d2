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
  std::vector<BF16> out(rows * n);
  for (auto _ : state) {
    ops->Linear({.input = {.rows = rows, .k = k, .codes = codes.data(), .scales = scales.data()},
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

}  // namespace
}  // namespace nibble

BENCHMARK_MAIN();
