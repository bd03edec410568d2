// nibble_attention_benchmark [check] [decode] [prefill] [rope]: checks the CUDA attention kernels against float64 and
// against themselves (a row's bits in any batch, grid and chunking), and times them. --json FILE stores the figures.
#include <cstdio>
#include <memory>
#include <string>

#include "kernels/cuda/attention/decode.h"
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

// The device, its scratch and its counters.
struct Bench {
  explicit Bench(const HeadShape& shape, int64_t max_rows, int64_t max_pages)
      : device(Describe()),
        scratch(AttentionScratchBytes(device, shape.layout(), shape.q_heads, max_rows, max_pages)),
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
  std::vector<uint16_t> Run(const Step& step, bool decode) {
    NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
    step.out().Fill(0xff);
    NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
    if (decode) {
      DecodeAttention(device, step.args(), DecodeRows::kAll, counters.data());
    } else {
      Attention(device, step.args(), counters.data());
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
  int64_t wrong;  // elements past one rounding and 1e-3 of the largest term
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
    if (!(excess <= 1e-3)) ++a.wrong;
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

void CheckDecode(const HeadShape& shape, float key_factor) {
  const std::vector<int64_t> lengths = {1,    2,    63,   64,   65,   127,  511,  512, 513, 1000,
                                        1023, 1024, 1025, 2049, 3000, 4097, 9000, 7,   1,   5000};
  const int64_t max_pages = 160;
  Cache cache(shape, 700, 5, key_factor);
  const std::vector<int32_t> tables = Tables(lengths, max_pages, 700, 3);
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s] % 64 != 0) cache.Poison(tables[s * max_pages + lengths[s] / 64], lengths[s] % 64);
  }
  Step step(cache, SingleRows(lengths), tables, max_pages, 7);
  Bench bench(shape, 64, max_pages);
  const std::vector<uint16_t> got = bench.Run(step, true);
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
    same = same && bench.Run(step, true) == got;
    bench.device.multiprocessors = all;
  }
  Expect(same, "decode: the same bits on 1, 5, 37 and 100 multiprocessors");
  const std::vector<uint32_t> counters = bench.counters.Get();
  Expect(std::count(counters.begin(), counters.end(), 0u) == static_cast<int64_t>(counters.size()),
         "decode: counters are zero again");
  bool alone = true;
  const std::vector<uint16_t> qkv = step.qkv().Get();
  for (size_t s : {0, 8, 13, 16}) {
    Step one(cache, {{lengths[s] - 1, 1}}, {tables.begin() + s * max_pages, tables.begin() + (s + 1) * max_pages},
             max_pages, 1);
    NIBBLE_CUDA_CHECK(cudaMemcpy(one.qkv().data(), qkv.data() + s * shape.qkv_cols(), shape.qkv_cols() * 2,
                                 cudaMemcpyHostToDevice));
    const std::vector<uint16_t> out = bench.Run(one, true);
    alone = alone && std::equal(out.begin(), out.end(), got.begin() + s * shape.out_cols());
  }
  Expect(alone, "decode: the same bits alone and in a batch");
}

// Steps over one large cache whose pages rotate, so that nothing stays in the second-level cache.
void TimeDecode(int64_t batch, const std::vector<int64_t>& lengths, const std::string& name, const Cache& cache) {
  const HeadShape& shape = cache.shape();
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const int64_t max_pages = (longest + 63) / 64;
  int64_t pages = 0;
  for (int64_t length : lengths) pages += (length + 63) / 64;
  const int64_t bytes = pages * shape.layout().page_bytes();
  const int64_t rotations = std::clamp<int64_t>((int64_t{600} << 20) / bytes, 2, 64);
  std::vector<std::unique_ptr<Step>> steps;
  Bench bench(shape, batch, max_pages);
  std::vector<int32_t> order(cache.pages().num_pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(11));
  size_t next = 0;
  std::vector<std::function<void()>> launches;
  for (int64_t r = 0; r < rotations; ++r) {
    std::vector<int32_t> tables(batch * max_pages, -1);
    for (int64_t s = 0; s < batch; ++s) {
      for (int64_t i = 0; i < (lengths[s] + 63) / 64; ++i) tables[s * max_pages + i] = order[next++ % order.size()];
    }
    steps.push_back(std::make_unique<Step>(cache, SingleRows(lengths), tables, max_pages, static_cast<uint32_t>(r)));
    const Step* step = steps.back().get();
    launches.push_back([&bench, step] {
      DecodeAttention(bench.device, step->args(), DecodeRows::kAll, bench.counters.data());
    });
  }
  const Timing timing = Time(bench.device.stream, launches);
  const double gbps = static_cast<double>(bytes) / timing.us / 1e3;
  std::printf("  %-24s %8.1f MB %9.2f us ±%4.1f%% %6.0f GB/s %5.1f%% %5.0f MHz\n", name.c_str(),
              static_cast<double>(bytes) / 1e6, timing.us, timing.spread * 100, gbps, gbps / kHbmGBps * 100,
              timing.sm_mhz);
  std::fflush(stdout);
  char entry[256];
  std::snprintf(entry, sizeof entry,
                "{\"op\":\"decode\",\"case\":\"%s\",\"bytes\":%ld,\"us\":%.3f,\"spread\":%.4f,\"gbps\":%.0f,"
                "\"share\":%.4f,\"sm_mhz\":%.0f},\n",
                name.c_str(), bytes, timing.us, timing.spread, gbps, gbps / kHbmGBps, timing.sm_mhz);
  json += entry;
}

void TimeAllDecode() {
  const HeadShape shape;
  Cache cache(shape, 65536 + 8192, 7, 1.0f);
  std::printf("decode, 64/8 heads x 128\n");
  for (int64_t batch : {1, 16, 64, 256}) {
    for (int64_t context : {1024, 4096, 16384}) {
      TimeDecode(batch, std::vector<int64_t>(batch, context), std::to_string(batch) + " x " + std::to_string(context),
                 cache);
    }
  }
  std::mt19937 random(17);
  std::vector<int64_t> uniform(64), mixed(64);
  for (int64_t& length : uniform) length = 1 + random() % 8192;
  for (size_t i = 0; i < 64; ++i) mixed[i] = i % 16 == 5 ? 8192 : 512 + random() % 1024;
  TimeDecode(64, uniform, "64 x 1..8192", cache);
  TimeDecode(64, mixed, "4 x 8192 + 60 x 512..1535", cache);
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
  if (wanted("check")) {
    CheckDecode({64, 8, 128}, 1.0f);
    CheckDecode({64, 8, 128}, 6.0f);
    CheckDecode({24, 8, 128}, 1.0f);
    CheckDecode({12, 1, 128}, 1.0f);
    CheckDecode({32, 8, 64}, 1.0f);
  }
  if (wanted("decode")) TimeAllDecode();
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
