// nibble_attention_benchmark [check] [overlap] [small] [decode] [prefill] [rope]: checks (small: few, for
// compute-sanitizer; overlap: launches back to back) the CUDA attention kernels against float64 and against themselves
// (a row's bits in any batch, grid and chunking), and times them. --json FILE stores the figures.
#include <cstdio>
#include <memory>
#include <string>

#include "kernels/cuda/attention/decode.h"
#include "kernels/cuda/attention/prefill.h"
#include "tests/kernels/cuda/attention_reference.h"
#include "tests/kernels/cuda/attention_workload.h"

namespace nibble::cuda {
namespace {

constexpr double kHbmGBps = 4550;  // read rate of grid-stride 16-byte loads on the H200

int failures = 0;
std::string json;

void Expect(bool condition, const std::string& what) {
  if (!condition) ++failures;
  std::printf("  %-6s %s\n", condition ? "ok" : "FAILED", what.c_str());
}

// What computes a step: one kernel for all of its rows, the kernel for many rows of a sequence wherever there are two, or
// what the backend chooses.
enum class Through { kDecode, kPrefill, kBackend };

// The device, its scratch and its counters.
struct Bench {
  Bench(const HeadShape& shape, int64_t max_pages)
      : device(Describe()),
        scratch(AttentionScratchBytes(device, shape.layout(), shape.q_heads, 0, max_pages)),
        counters(AttentionCounterBytes(device) / sizeof(uint32_t)) {
    counters.Fill(0);
    scratch.Fill(0xff);
    device.scratch = scratch.data();
    device.scratch_bytes = static_cast<int64_t>(scratch.count());
    NIBBLE_CUDA_CHECK(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
  }
  ~Bench() { cudaStreamDestroy(device.stream); }
  static Device Describe() {
    cudaDeviceProp properties;
    NIBBLE_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    Device device;
    device.capability = properties.major * 10 + properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    device.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
    device.l2_bytes = properties.l2CacheSize;
    return device;
  }
  // Runs the step and returns its output rows.
  std::vector<uint16_t> Run(const Step& step, Through through) {
    NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
    step.out().Fill(0xff);
    NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
    switch (through) {
      case Through::kDecode:
        DecodeAttention(device, step.args(), DecodeRows::kAll, counters.data());
        break;
      case Through::kPrefill:
        PrefillAttention(device, step.args());
        DecodeAttention(device, step.args(), DecodeRows::kSingle, counters.data());
        break;
      case Through::kBackend:
        Attention(device, step.args(), counters.data());
        break;
    }
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));
    return step.out().Get();
  }

  Device device;
  DeviceArray<uint8_t> scratch;
  DeviceArray<uint32_t> counters;
};

// Random page tables for sequences of these lengths.
std::vector<int32_t> Tables(const std::vector<int64_t>& lengths, int64_t max_pages, int64_t pool, uint32_t seed) {
  std::vector<int32_t> pages(pool), tables(lengths.size() * max_pages, -1);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(seed));
  size_t next = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int64_t i = 0; i < (lengths[s] + 63) / 64; ++i) tables[s * max_pages + i] = pages[next++ % pages.size()];
  }
  return tables;
}

// Worst (error − one bf16 rounding) / largest term over all rows, and the relative error.
struct Accuracy {
  double noise, relative, rounding_alone;
  int64_t wrong;  // elements past one rounding and one f16 rounding of the largest term
};
Accuracy Compare(const Cache& cache, const Step& step, const std::vector<int64_t>& lengths,
                 const std::vector<int32_t>& tables, int64_t max_pages, const std::vector<uint16_t>& got) {
  const HeadShape& shape = cache.shape();
  const std::vector<uint8_t> bytes = cache.Get();
  const std::vector<uint16_t> q = step.qkv().Get();
  const int64_t d = shape.head_dim, rows = static_cast<int64_t>(lengths.size());
  std::vector<double> want(rows * shape.out_cols()), largest(want.size());
  std::vector<std::thread> threads;
  for (int worker = 0; worker < 16; ++worker) {
    threads.emplace_back([&, worker] {
      for (int64_t i = worker; i < rows * shape.q_heads; i += 16) {
        const int64_t row = i / shape.q_heads, head = i % shape.q_heads;
        const int64_t at = row * shape.out_cols() + head * d;
        ReferenceHead(bytes, shape.layout().head_bytes(), shape.kv_heads, head * shape.kv_heads / shape.q_heads,
                      &tables[row * max_pages], static_cast<int>(lengths[row]), static_cast<int>(d),
                      &q[row * shape.qkv_cols() + head * d], 1.0 / std::sqrt(static_cast<double>(d)), &want[at],
                      &largest[at]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Accuracy a = {0, 0, 0, 0};
  double norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(Bf16Value(got[i]) - want[i]);
    const double excess = (error - std::fabs(want[i]) * 0x1p-8) / largest[i];
    if (!(excess <= a.noise)) a.noise = std::isnan(excess) ? 1e9 : excess;
    if (!(excess <= 0x1p-11)) ++a.wrong;
    a.relative += error * error;
    const double rounded = ToFloat(ToBF16(static_cast<float>(want[i]))) - want[i];
    a.rounding_alone += rounded * rounded;
    norm += want[i] * want[i];
  }
  a.relative = std::sqrt(a.relative / norm);
  a.rounding_alone = std::sqrt(a.rounding_alone / norm);
  return a;
}

std::vector<Part> SingleRows(const std::vector<int64_t>& lengths) {
  std::vector<Part> parts;
  for (int64_t length : lengths) parts.push_back({length - 1, 1});
  return parts;
}

const std::vector<int64_t> kLengths = {1,    2,    63,   64,   65,   127,  511,  512, 513, 1000,
                                       1023, 1024, 1025, 2049, 3000, 4097, 9000, 7,   1,   5000};

// One chunk each: shares are drawn where the grid is small.
const std::vector<int64_t> kShortLengths = {1024, 1000, 1,   640, 513,  1024, 64,  900,
                                            1023, 65,   256, 700, 1024, 129,  960, 1024};

void CheckDecode(const HeadShape& shape, float key_factor, const std::vector<int64_t>& lengths = kLengths) {
  const int64_t max_pages = 160;
  Cache cache(shape, 700, 5, key_factor);
  const std::vector<int32_t> tables = Tables(lengths, max_pages, 700, 3);
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s] % 64 != 0) cache.Poison(tables[s * max_pages + lengths[s] / 64], lengths[s] % 64);
  }
  Step step(cache, SingleRows(lengths), tables, max_pages, 7);
  Bench bench(shape, max_pages);
  const std::vector<uint16_t> got = bench.Run(step, Through::kDecode);
  const Accuracy a = Compare(cache, step, lengths, tables, max_pages, got);
  char text[200];
  std::snprintf(text, sizeof text,
                "decode %ld/%ld heads x %ld: error %.3e (rounding alone %.3e), past one rounding %.2e of the largest "
                "term, %ld wrong",
                shape.q_heads, shape.kv_heads, shape.head_dim, a.relative, a.rounding_alone, a.noise, a.wrong);
  Expect(a.wrong == 0, text);
  bool same = true;
  for (int multiprocessors : {1, 5, 37, 100}) {
    const int all = bench.device.multiprocessors;
    bench.device.multiprocessors = multiprocessors;
    same = same && bench.Run(step, Through::kDecode) == got;
    bench.device.multiprocessors = all;
  }
  Expect(same, "decode: the same bits on 1, 5, 37 and 100 multiprocessors");
  const std::vector<uint32_t> counters = bench.counters.Get();
  Expect(std::count(counters.begin(), counters.end(), 0u) == static_cast<int64_t>(counters.size()),
         "decode: counters are zero again");
  bool alone = true;
  const std::vector<uint16_t> qkv = step.qkv().Get();
  for (size_t s = 0; s < lengths.size(); s += 4) {
    Step one(cache, {{lengths[s] - 1, 1}}, {tables.begin() + s * max_pages, tables.begin() + (s + 1) * max_pages},
             max_pages, 1);
    NIBBLE_CUDA_CHECK(cudaMemcpy(one.qkv().data(), qkv.data() + s * shape.qkv_cols(), shape.qkv_cols() * 2,
                                 cudaMemcpyHostToDevice));
    const std::vector<uint16_t> out = bench.Run(one, Through::kDecode);
    alone = alone && std::equal(out.begin(), out.end(), got.begin() + s * shape.out_cols());
  }
  Expect(alone, "decode: the same bits alone and in a batch");
}

// A step of some rows of one sequence whose queries are rows of `queries`, attended over `tables`.
std::unique_ptr<Step> StepOf(const Cache& cache, const std::vector<Part>& parts, const std::vector<int32_t>& table,
                             int64_t max_pages, const DeviceArray<uint16_t>& queries) {
  const int64_t cols = cache.shape().qkv_cols();
  std::vector<int32_t> tables;
  for (size_t s = 0; s < parts.size(); ++s) tables.insert(tables.end(), table.begin(), table.end());
  auto step = std::make_unique<Step>(cache, parts, tables, max_pages, 1);
  int64_t row = 0;
  for (const Part& part : parts) {
    NIBBLE_CUDA_CHECK(cudaMemcpy(step->qkv().data() + row * cols, queries.data() + part.position * cols,
                                 part.rows * cols * 2, cudaMemcpyDeviceToDevice));
    row += part.rows;
  }
  return step;
}

// The rows of one sequence in one chunk, in chunks of other sizes, one by one, and both kinds in one step.
void CheckChunks(const HeadShape& shape, int64_t length) {
  const int64_t max_pages = length / 64 + 2, out_cols = shape.out_cols();
  Cache cache(shape, max_pages + 30, 9, 1.0f);
  const std::vector<int32_t> table = Tables({length}, max_pages, max_pages + 30, 4);
  if (length % 64 != 0) cache.Poison(table[length / 64], length % 64);
  DeviceArray<uint16_t> queries(length * shape.qkv_cols());
  FillNormal(queries.data(), static_cast<int64_t>(queries.count()), 21, 1.0f);
  Bench bench(shape, max_pages);
  // Few rows go through decode if the backend may choose.
  const Through through = shape.head_dim == 64 || shape.head_dim == 128 ? Through::kPrefill : Through::kBackend;
  const auto run = [&](const std::vector<Part>& parts) {
    const auto step = StepOf(cache, parts, table, max_pages, queries);
    const std::vector<uint16_t> rows = bench.Run(*step, through);
    if (bench.Run(*step, Through::kBackend) != rows) Expect(false, "the backend gives other bits than its kernels");
    return rows;
  };
  const std::vector<uint16_t> whole = run({{0, length}});
  char name[64];
  std::snprintf(name, sizeof name, "%ld/%ld heads x %ld, %ld tokens", shape.q_heads, shape.kv_heads, shape.head_dim,
                length);
  const std::vector<int64_t> sampled = {0, 1, 5, 63, 64, 100, length / 3, length / 2, length - 1};
  {
    std::vector<Part> rows;
    std::vector<int64_t> lengths;
    std::vector<int32_t> tables;
    std::vector<uint16_t> got;
    for (int64_t position : sampled) {
      rows.push_back({position, 1});
      lengths.push_back(position + 1);
      tables.insert(tables.end(), table.begin(), table.end());
      got.insert(got.end(), whole.begin() + position * out_cols, whole.begin() + (position + 1) * out_cols);
    }
    const auto step = StepOf(cache, rows, table, max_pages, queries);
    const Accuracy a = Compare(cache, *step, lengths, tables, max_pages, got);
    char text[200];
    std::snprintf(text, sizeof text, "prefill %s: error %.3e (rounding alone %.3e), past one rounding %.2e, %ld wrong",
                  name, a.relative, a.rounding_alone, a.noise, a.wrong);
    Expect(a.wrong == 0, text);
  }
  for (int64_t chunk : {int64_t{2048}, int64_t{100}, int64_t{16}, int64_t{1}}) {
    const int64_t step_over = chunk < 100 ? 64 * chunk + 37 : chunk;  // small chunks: some of them
    int64_t wrong = 0, rows = 0;
    for (int64_t begin = 0; begin < length; begin += step_over) {
      const int64_t count = std::min(chunk, length - begin);
      const std::vector<uint16_t> got = run({{begin, count}});
      for (int64_t r = 0; r < count; ++r, ++rows) {
        wrong += !std::equal(got.begin() + r * out_cols, got.begin() + (r + 1) * out_cols,
                             whole.begin() + (begin + r) * out_cols);
      }
    }
    Expect(wrong == 0, std::string(name) + ": chunks of " + std::to_string(chunk) + ", " + std::to_string(wrong) +
                           " of " + std::to_string(rows) + " rows differ");
  }
  std::vector<Part> mixed = {{length / 2, 40}, {0, 2}, {length / 3, 200}};
  for (int64_t position : sampled) mixed.insert(mixed.begin() + mixed.size() / 2, {position, 1});
  const std::vector<uint16_t> got = run(mixed);
  int64_t wrong = 0, row = 0;
  for (const Part& part : mixed) {
    for (int64_t r = 0; r < part.rows; ++r, ++row) {
      wrong += !std::equal(got.begin() + row * out_cols, got.begin() + (row + 1) * out_cols,
                           whole.begin() + (part.position + r) * out_cols);
    }
  }
  Expect(wrong == 0, std::string(name) + ": chunks and single rows in one step, " + std::to_string(wrong) + " of " +
                         std::to_string(row) + " rows differ");
}

// Codes, parameters and rotated queries against the formulas of docs/numerics.md and kernels/cpu/attention_inl.h.
void CheckRope(const HeadShape& shape, float factor) {
  const int64_t d = shape.head_dim, rows = 200, first = 1000, max_pages = 20, half = d / 2;
  Cache cache(shape, 40, 3, 1.0f);
  const std::vector<int32_t> table = Tables({max_pages * 64}, max_pages, 40, 8);
  Step step(cache, {{first, rows}}, table, max_pages, 5);
  FillNormal(step.qkv().data(), rows * shape.qkv_cols(), 55, factor);
  std::vector<float> cos_sin(max_pages * 64 * d);
  for (int64_t p = 0; p < max_pages * 64; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) * std::pow(500000.0, -static_cast<double>(i) / half);
      cos_sin[p * d + i] = static_cast<float>(std::cos(angle));
      cos_sin[p * d + half + i] = static_cast<float>(std::sin(angle));
    }
  }
  DeviceArray<float> cos_sin_array(cos_sin);
  Bench bench(shape, max_pages);
  const std::vector<uint16_t> in = step.qkv().Get();
  const AttentionArgs a = step.args();
  NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
  RopeAppend(bench.device, {.step = a.step,
                            .qkv = a.qkv,
                            .q_heads = a.q_heads,
                            .cos_sin = cos_sin_array.data(),
                            .max_positions = max_pages * 64,
                            .pages = a.pages});
  NIBBLE_CUDA_CHECK(cudaStreamSynchronize(bench.device.stream));
  const std::vector<uint16_t> out = step.qkv().Get();
  const std::vector<uint8_t> bytes = cache.Get();
  int64_t wrong_q = 0, wrong_codes = 0, wrong_parameters = 0;
  const auto saturated = [](float x) { return ToF16(std::clamp(x, -65504.0f, 65504.0f)); };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < shape.q_heads + 2 * shape.kv_heads; ++head) {
      const int64_t at = row * shape.qkv_cols() + head * d, position = first + row;
      const bool is_value = head >= shape.q_heads + shape.kv_heads;
      std::vector<float> x(d);
      for (int64_t i = 0; i < d; ++i) x[i] = ToFloat(BF16{in[at + i]});
      for (int64_t i = 0; i < half && !is_value; ++i) {
        const float low = x[i], high = x[half + i], c = cos_sin[position * d + i], s = cos_sin[position * d + half + i];
        x[i] = std::fma(low, c, 0.0f - high * s);
        x[half + i] = std::fma(high, c, low * s);
      }
      if (head < shape.q_heads) {
        for (int64_t i = 0; i < d; ++i) wrong_q += out[at + i] != ToBF16(x[i]).bits;
        continue;
      }
      const auto [low, high] = std::minmax_element(x.begin(), x.end());
      const float minimum = -(0.0f - *low);
      const F16 scale = saturated((*high - minimum) / 15.0f), zero = saturated(minimum);
      const int64_t kv_head = head - shape.q_heads - (is_value ? shape.kv_heads : 0);
      const uint8_t* page = bytes.data() + table[position / 64] * shape.layout().page_bytes() +
                            kv_head * shape.layout().head_bytes();
      const int token = static_cast<int>(position % 64), dim = static_cast<int>(d);
      F16 got[2];
      std::memcpy(got, page + KvParameters(dim, token) + 4 * is_value, 4);
      wrong_parameters += got[0].bits != scale.bits || got[1].bits != zero.bits;
      for (int i = 0; i < dim; ++i) {
        const float s = ToFloat(scale), z = ToFloat(zero);
        const int want =
            s == 0 ? 0 : static_cast<int>(std::fmin(15.0f, std::fmax(std::nearbyint((x[i] - z) / s), 0.0f)));
        const int byte = is_value ? VCodeWord(dim, token, i / 4 * 4) + i % 4 / 2 : KCodeByte(dim, token, i);
        wrong_codes += (page[byte] >> (i % 2 * 4) & 15) != want;
      }
    }
  }
  Expect(wrong_q + wrong_codes + wrong_parameters == 0,
         "rope: wrong q, codes, parameters: " + std::to_string(wrong_q) + ", " + std::to_string(wrong_codes) +
             ", " + std::to_string(wrong_parameters) + ", head_dim " + std::to_string(d) + ", values x " +
             std::to_string(factor));
}

void Record(const char* op, const std::string& name, const Timing& timing, double bytes, double flops) {
  const double gbps = bytes / timing.us / 1e3, tflops = flops / timing.us / 1e6;
  std::printf("  %-26s %8.1f MB %9.2f us +-%4.1f%% %6.0f GB/s %5.1f%%", name.c_str(), bytes / 1e6, timing.us,
              timing.spread * 100, gbps, gbps / kHbmGBps * 100);
  if (flops > 0) std::printf(" %6.1f TFLOP/s", tflops);
  std::printf(" %5.0f MHz\n", timing.sm_mhz);
  std::fflush(stdout);
  char entry[320];
  std::snprintf(entry, sizeof entry,
                "{\"op\":\"%s\",\"case\":\"%s\",\"bytes\":%.0f,\"flops\":%.0f,\"us\":%.3f,\"spread\":%.4f,"
                "\"gbps\":%.0f,\"share\":%.4f,\"tflops\":%.1f,\"sm_mhz\":%.0f},\n",
                op, name.c_str(), bytes, flops, timing.us, timing.spread, gbps, gbps / kHbmGBps, tflops, timing.sm_mhz);
  json += entry;
}

void TimePrefill(const Cache& cache, int64_t prefix, int64_t rows) {
  const HeadShape& shape = cache.shape();
  const int64_t max_pages = (prefix + rows + 63) / 64;
  Bench bench(shape, max_pages);
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<std::function<void()>> launches;
  for (uint32_t r = 0; r < 4; ++r) {
    steps.push_back(std::make_unique<Step>(cache, std::vector<Part>{{prefix, rows}},
                                           Tables({prefix + rows}, max_pages, cache.pages().num_pages, r), max_pages, r));
    const Step* step = steps.back().get();
    launches.push_back([&bench, step] { Attention(bench.device, step->args(), bench.counters.data()); });
  }
  const double pairs = static_cast<double>(rows) * static_cast<double>(prefix) +
                       0.5 * static_cast<double>(rows) * static_cast<double>(rows + 1);
  Record("prefill", std::to_string(rows) + " after " + std::to_string(prefix), Time(bench.device.stream, launches, 9),
         static_cast<double>(max_pages * shape.layout().page_bytes() + 2 * rows * shape.out_cols() * 2),
         4.0 * static_cast<double>(shape.head_dim * shape.q_heads) * pairs);
}

void TimeRope(const Cache& cache, int64_t rows) {
  const HeadShape& shape = cache.shape();
  const int64_t max_pages = rows / 64 + 2, d = shape.head_dim;
  Bench bench(shape, max_pages);
  DeviceArray<float> cos_sin(std::vector<float>(max_pages * 64 * d, 0.7f));
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<std::function<void()>> launches;
  const int64_t rotations = std::clamp<int64_t>(8192 / rows, 3, 64);
  for (uint32_t r = 0; r < rotations; ++r) {
    // As many sequences as rows up to 64 (a decode step), above that one chunk.
    std::vector<Part> parts = {{0, rows}};
    if (rows <= 64) parts.assign(rows, {r % 64, 1});
    std::vector<int64_t> lengths(parts.size(), rows);
    steps.push_back(std::make_unique<Step>(cache, parts, Tables(lengths, max_pages, cache.pages().num_pages, r),
                                           max_pages, r));
    const AttentionArgs a = steps.back()->args();
    launches.push_back([&bench, &cos_sin, a, max_pages] {
      RopeAppend(bench.device, {.step = a.step,
                                .qkv = a.qkv,
                                .q_heads = a.q_heads,
                                .cos_sin = cos_sin.data(),
                                .max_positions = max_pages * 64,
                                .pages = a.pages});
    });
  }
  const int64_t row_bytes = (shape.qkv_cols() + shape.out_cols()) * 2 + 2 * shape.kv_heads * (d / 2 + 4) + 4 * d;
  Record("rope_append", std::to_string(rows) + " rows", Time(bench.device.stream, launches),
         static_cast<double>(rows * row_bytes), 0);
}

// Steps over one large cache whose pages rotate, so that nothing stays in the second-level cache, one launch each.
struct DecodeSteps {
  DecodeSteps(const std::vector<int64_t>& lengths, const Cache& cache)
      : max_pages((*std::max_element(lengths.begin(), lengths.end()) + 63) / 64), bench(cache.shape(), max_pages) {
    const int64_t batch = static_cast<int64_t>(lengths.size());
    int64_t pages = 0;
    for (int64_t length : lengths) pages += (length + 63) / 64;
    bytes = pages * cache.shape().layout().page_bytes();
    const int64_t rotations = std::clamp<int64_t>((int64_t{600} << 20) / bytes, 2, 64);
    std::vector<int32_t> order(cache.pages().num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(11));
    size_t next = 0;
    for (int64_t r = 0; r < rotations; ++r) {
      std::vector<int32_t> tables(batch * max_pages, -1);
      for (int64_t s = 0; s < batch; ++s) {
        for (int64_t i = 0; i < (lengths[s] + 63) / 64; ++i) tables[s * max_pages + i] = order[next++ % order.size()];
      }
      steps.push_back(std::make_unique<Step>(cache, SingleRows(lengths), tables, max_pages, static_cast<uint32_t>(r)));
      launches.push_back([this, step = steps.back().get()] {
        DecodeAttention(bench.device, step->args(), DecodeRows::kAll, bench.counters.data());
      });
    }
  }

  int64_t max_pages, bytes;
  Bench bench;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<std::function<void()>> launches;
};

void TimeDecode(const std::vector<int64_t>& lengths, const std::string& name, const Cache& cache) {
  const DecodeSteps steps(lengths, cache);
  Record("decode", name, Time(steps.bench.device.stream, steps.launches), static_cast<double>(steps.bytes), 0);
}

// Launches that overlap, in replays of a graph, against the same launches one at a time.
void CheckOverlap(const std::vector<int64_t>& lengths, const std::string& name, const Cache& cache) {
  DecodeSteps steps(lengths, cache);
  std::vector<std::vector<uint16_t>> alone;
  for (const auto& step : steps.steps) {
    alone.push_back(steps.bench.Run(*step, Through::kDecode));
    step->out().Fill(0xff);
  }
  Time(steps.bench.device.stream, steps.launches, 40);
  int64_t wrong = 0;
  for (size_t i = 0; i < alone.size(); ++i) wrong += steps.steps[i]->out().Get() != alone[i];
  const std::vector<uint32_t> counters = steps.bench.counters.Get();
  const int64_t zero = std::count(counters.begin(), counters.end(), 0u);
  Expect(wrong == 0 && zero == static_cast<int64_t>(counters.size()),
         "decode " + name + ", launches that overlap: " + std::to_string(wrong) + " of " +
             std::to_string(alone.size()) + " differ from launches alone, " +
             std::to_string(static_cast<int64_t>(counters.size()) - zero) + " counters are not zero");
}

// The shapes that are timed.
std::vector<std::pair<std::string, std::vector<int64_t>>> DecodeShapes() {
  std::vector<std::pair<std::string, std::vector<int64_t>>> shapes;
  for (int64_t batch : {1, 16, 64, 256}) {
    for (int64_t context : {1024, 4096, 16384}) {
      shapes.emplace_back(std::to_string(batch) + " x " + std::to_string(context),
                          std::vector<int64_t>(batch, context));
    }
  }
  std::mt19937 random(17);
  std::vector<int64_t> uniform(64), mixed(64);
  for (int64_t& length : uniform) length = 1 + random() % 8192;
  for (size_t i = 0; i < 64; ++i) mixed[i] = i % 16 == 5 ? 8192 : 512 + random() % 1024;
  shapes.emplace_back("64 x 1..8192", uniform);
  shapes.emplace_back("4 x 8192 + 60 x 512..1535", mixed);
  return shapes;
}

void ForDecodeShapes(void (*what)(const std::vector<int64_t>&, const std::string&, const Cache&)) {
  const Cache cache({}, 65536 + 8192, 7, 1.0f);
  std::printf("decode, 64/8 heads x 128\n");
  for (const auto& [name, lengths] : DecodeShapes()) what(lengths, name, cache);
}

}  // namespace

int Main(int argc, char** argv) {
  std::string json_path;
  std::vector<std::string> modes;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--json" && i + 1 < argc) {
      json_path = argv[++i];
    } else {
      modes.push_back(argv[i]);
    }
  }
  const auto wanted = [&](const char* mode) {
    return modes.empty() || std::find(modes.begin(), modes.end(), mode) != modes.end();
  };
  if (std::find(modes.begin(), modes.end(), "small") != modes.end()) {
    CheckDecode({16, 2, 128}, 1.0f, {1, 65, 700, 1100});
    CheckDecode({8, 2, 64}, 1.0f, {100, 30});
    CheckDecode({16, 2, 128}, 1.0f, kShortLengths);
    CheckRope({16, 2, 128}, 1.0f);
    CheckRope({3, 1, 96}, 1.0f);
    CheckChunks({16, 2, 128}, 310);
    CheckChunks({8, 2, 64}, 300);
    CheckChunks({3, 1, 96}, 300);
  }
  if (wanted("check")) {
    CheckDecode({64, 8, 128}, 1.0f);
    CheckDecode({64, 8, 128}, 6.0f);
    CheckDecode({24, 8, 128}, 1.0f);
    CheckDecode({12, 1, 128}, 1.0f);
    CheckDecode({32, 8, 64}, 1.0f);
    CheckDecode({64, 8, 128}, 1.0f, kShortLengths);
    CheckDecode({32, 8, 64}, 1.0f, kShortLengths);
  }
  if (wanted("check")) {
    CheckRope({64, 8, 128}, 1.0f);
    CheckRope({32, 8, 64}, 1.0f);
    CheckRope({6, 2, 96}, 1.0f);
    CheckRope({64, 8, 128}, 1e30f);
    CheckRope({64, 8, 128}, 0.0f);
    CheckRope({64, 8, 128}, 1e-39f);
    CheckChunks({64, 8, 128}, 5000);
    CheckChunks({64, 8, 128}, 1000);
    CheckChunks({32, 8, 64}, 4500);
    CheckChunks({24, 8, 128}, 700);
    CheckChunks({12, 1, 128}, 700);
    CheckChunks({7, 1, 96}, 300);
  }
  const HeadShape shape;
  if (wanted("prefill") || wanted("rope")) {
    Cache cache(shape, 4096, 7, 1.0f);
    if (wanted("prefill")) {
      std::printf("prefill, 64/8 heads x 128\n");
      for (int64_t rows : {1024, 2048, 4096, 8192, 16384}) TimePrefill(cache, 0, rows);
      TimePrefill(cache, 14336, 2048);
      TimePrefill(cache, 8192, 16);
    }
    if (wanted("rope")) {
      std::printf("RoPE and append, 64/8 heads x 128\n");
      for (int64_t rows : {1, 16, 32, 64, 256, 1024, 4096}) TimeRope(cache, rows);
    }
  }
  if (wanted("overlap")) ForDecodeShapes(CheckOverlap);
  if (wanted("decode")) ForDecodeShapes(TimeDecode);
  if (!json_path.empty()) {
    if (std::FILE* file = std::fopen(json_path.c_str(), "w")) {
      if (json.size() > 2) json.resize(json.size() - 2);
      std::fprintf(file, "[\n%s\n]\n", json.c_str());
      std::fclose(file);
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace nibble::cuda

int main(int argc, char** argv) { return nibble::cuda::Main(argc, argv); }
