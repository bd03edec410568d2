// nibble_gemm_benchmark: checks the W4Ax kernel bit for bit against a plain integer product, then times it against
// cuBLASLt in bf16 and fp8 in the same run. Graphs of launches as in a decode step, weights rotated beyond the L2 cache.
//
//   nibble_gemm_benchmark [check=1,16,..] [m=1,16,..] [shapes=qkv,o,..] [tune=FILE] [cublas=0] [json=FILE]
//                         [pause_ms=30] [replays=5] [repeats=2] [only=CONFIG,..] [a4=1] [silu=1] [pack=1]
//
// check: these numbers of rows with every plan, against the rows of one reference for the largest number, `repeats`
// times. m: times the picked plan; with tune, every plan of hope, one line each in FILE. a4: activations as W4A4 codes
// them. silu: times the SiLU · mul epilogue instead of the plain one. pack: times bringing each shape's weight from host
// memory into device order.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/cuda/gemm_w4ax/gemm.h"
#include "kernels/cuda/gemm_w4ax/launch.h"
#include "kernels/cuda/gemm_w4ax/layout.h"
#include "kernels/cuda/measure/matmul.h"
#include "tests/kernels/cuda/gemm_w4ax_data.cuh"

namespace nibble::cuda::bench {
namespace {

constexpr int64_t kRotatedBytes = 300'000'000;
constexpr double kMemoryBytesPerUs = 4.55e6;  // what plain reads reach on an H200
constexpr int64_t kGuardRows = 8;
constexpr double kHopeless = 1.7;  // times the picked plan's price: not timed when tuning

struct Shape {
  const char* name;
  int64_t n, k;
};
constexpr Shape kShapes[] = {
    {"qkv", 10240, 8192},        {"o", 8192, 8192},          {"gate_up", 57344, 8192},      {"down", 8192, 28672},
    {"tp2.qkv", 5120, 8192},     {"tp2.o", 8192, 4096},      {"tp2.gate_up", 28672, 8192},  {"tp2.down", 8192, 14336},
    {"tp4.qkv", 2560, 8192},     {"tp4.o", 8192, 2048},      {"tp8.qkv", 1280, 8192},       {"tp8.down", 8192, 3584},
    {"8b.qkv", 6144, 4096},      {"8b.o", 4096, 4096},       {"8b.gate_up", 28672, 4096},   {"8b.down", 4096, 14336},
    {"small.gate_up", 3072, 512}, {"small.down", 512, 1536},
};

template <typename T>
T* Allocate(int64_t count) {
  void* data;
  NIBBLE_CUDA_CHECK(cudaMalloc(&data, count * sizeof(T)));
  return static_cast<T*>(data);
}

struct Options {
  std::vector<int64_t> check, rows;
  std::vector<std::string> shapes = {"qkv", "o", "gate_up", "down"};
  std::vector<std::string> only;  // configurations; empty: all
  std::string tune, json;

  bool Wants(const GemmPlan& plan) const {
    return only.empty() || std::find(only.begin(), only.end(), plan.Config().name) != only.end();
  }
  bool cublas = true, four_bits = false, silu = false, pack = false;
  int pause_ms = 30;
  int replays = 5;
  int repeats = 2;
};

struct Result {
  std::string shape, plan;
  int64_t n, k, rows;
  double us, mhz, bf16_us, fp8_us;
};

// Runs launch(i) for i in 0..launches-1 as one graph a few times; median microseconds of a launch.
double TimeGraph(cudaStream_t stream, int launches, int replays, const std::function<void(int)>& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  NIBBLE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i);
  NIBBLE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  NIBBLE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  NIBBLE_CUDA_CHECK(cudaEventCreate(&begin));
  NIBBLE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int r = 0; r < replays + 1; ++r) {
    NIBBLE_CUDA_CHECK(cudaEventRecord(begin, stream));
    NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    NIBBLE_CUDA_CHECK(cudaEventRecord(end, stream));
    NIBBLE_CUDA_CHECK(cudaEventSynchronize(end));
    float ms;
    NIBBLE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (r > 0) times.push_back(ms * 1e3 / launches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int Launches(const Shape& shape, int64_t rows) { return 2.0 * rows * shape.n * shape.k > 2e12 ? 8 : 20; }

// The fastest of cuBLASLt's proposals, each after a pause. 0 when it has no algorithm.
double TimeCublas(const Device& device, MatmulType type, const Shape& shape, int64_t rows, const Options& options) {
  CublasMatmul matmul(type, shape.n, shape.k, rows, kRotatedBytes / 4, device.stream);
  double best = 0;
  for (int i = 0; i < matmul.proposals(); ++i) {
    if (!matmul.Works(i)) continue;
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));
    usleep(1000 * options.pause_ms);
    const double us = TimeGraph(device.stream, Launches(shape, rows), options.replays, [&](int j) { matmul.Issue(i, j); });
    if (best == 0 || us < best) best = us;
  }
  return best;
}

// One shape's tensors on the device.
class Problem {
 public:
  Problem(const Device& device, const Shape& shape, int64_t max_rows, int copies, const Options& options)
      : device_(device),
        shape_(shape),
        max_rows_(max_rows),
        output_(options.silu ? GemmOutput::kSiluMul : GemmOutput::kBF16) {
    const int64_t n = shape.n, k = shape.k, groups = n * k / kBlock;
    qweight_ = Allocate<uint8_t>(n * k / 2);
    scale_ = Allocate<uint8_t>(groups);
    minimum_ = Allocate<int8_t>(groups);
    for (int i = copies; i-- > 0;) {  // the first copy's logical tensors stay
      FillGroups<<<static_cast<unsigned>(groups / 256 + 1), 256, 0, device.stream>>>(scale_, minimum_, groups, i);
      FillCodes<<<4096, 256, 0, device.stream>>>(qweight_, scale_, minimum_, n, k, i);
      blocks_.push_back(Allocate<uint8_t>(W4AxBytes(n, k) + kW4AxSlackBytes));
      NIBBLE_CUDA_CHECK(cudaMemsetAsync(blocks_.back(), 0, W4AxBytes(n, k), device.stream));
      LaunchW4AxRelayout(device.stream, {n, k, qweight_, scale_, minimum_, nullptr}, {}, blocks_.back());
    }
    codes_ = Allocate<int8_t>(max_rows * k);
    token_scale_ = Allocate<float>(max_rows);
    code_sums_ = Allocate<int32_t>(max_rows);
    channel_scale_ = Allocate<float>(n);
    out_ = Allocate<uint16_t>((max_rows + kGuardRows) * n);
    arrivals_ = Allocate<int32_t>(kMaxGemmWorkers * kGemmArrivalsPerWorker);
        clock_ = Allocate<int64_t>(2);
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(arrivals_, 0, kMaxGemmWorkers * kGemmArrivalsPerWorker * 4, device.stream));
    FillActivations<<<1024, 256, 0, device.stream>>>(codes_, max_rows * k, n + k, options.four_bits);
    SumRows<<<static_cast<unsigned>(max_rows), 256, 0, device.stream>>>(codes_, code_sums_, k);
    FillScales<<<static_cast<unsigned>(max_rows / 256 + 1), 256, 0, device.stream>>>(token_scale_, max_rows, 3);
    FillScales<<<static_cast<unsigned>(n / 256 + 1), 256, 0, device.stream>>>(channel_scale_, n, 4);
  }
  ~Problem() {
    cudaStreamSynchronize(device_.stream);
    for (uint8_t* blocks : blocks_) cudaFree(blocks);
    for (void* data : std::initializer_list<void*>{qweight_, scale_, minimum_, codes_, token_scale_, code_sums_,
                                                   channel_scale_, out_, arrivals_, clock_, want_}) {
      cudaFree(data);
    }
  }

  GemmShape At(int64_t rows) const { return {shape_.n, shape_.k, rows, device_.multiprocessors}; }

  void Launch(const GemmPlan& plan, int64_t rows, int copy) {
    LaunchGemm(device_, plan, codes_, shape_.k,
               {.weights = blocks_[blocks_.size() - 1 - copy % blocks_.size()],
                .channel_scale = channel_scale_,
                .token_scale = token_scale_,
                .code_sums = code_sums_,
                .out = out_,
                .partials = device_.Scratch<int32_t>(plan.PartialBytes()),
                .arrivals = arrivals_,
                .clock = clock_,
                .rows = static_cast<int>(rows),
                .n = static_cast<int>(shape_.n),
                .output = output_});
  }

  // Elements that differ from the reference for all rows, or that were written beyond the rows; -1: not finished.
  int64_t Check(const GemmPlan& plan, int64_t rows) {
    if (want_ == nullptr) MakeReference();
    const int64_t size = rows * shape_.n, guard = kGuardRows * shape_.n;
    Poison<<<1024, 256, 0, device_.stream>>>(out_, size + guard);
    NIBBLE_CUDA_CHECK(cudaMemsetAsync(wrong_, 0, 16, device_.stream));
    Launch(plan, rows, 0);
    Compare<<<1024, 256, 0, device_.stream>>>(out_, want_, size, wrong_);
    Compare<<<64, 256, 0, device_.stream>>>(out_ + size, want_ + max_rows_ * shape_.n, guard, wrong_);
    unsigned long long wrong[2];
    NIBBLE_CUDA_CHECK(cudaMemcpyAsync(wrong, wrong_, 16, cudaMemcpyDeviceToHost, device_.stream));
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
    if (wrong[0] != 0) {
      std::printf("WRONG %s rows %ld, %s: %llu elements, one at [%llu, %llu]\n", shape_.name, rows,
                  PrintGemmPlan(plan).c_str(), wrong[0], wrong[1] / shape_.n, wrong[1] % shape_.n);
    }
    return static_cast<int64_t>(wrong[0]);
  }

  // Microseconds and MHz.
  std::pair<double, double> Time(const GemmPlan& plan, int64_t rows, int replays) {
    const double us = TimeGraph(device_.stream, Launches(shape_, rows), replays, [&](int i) { Launch(plan, rows, i); });
    int64_t clock[2];
    NIBBLE_CUDA_CHECK(cudaMemcpy(clock, clock_, 16, cudaMemcpyDeviceToHost));
    return {us, 1e3 * static_cast<double>(clock[0]) / static_cast<double>(clock[1] + 1)};
  }

 private:
  void MakeReference() {
    const int64_t n = shape_.n, k = shape_.k;
    int8_t* w8 = Allocate<int8_t>(n * k);
    want_ = Allocate<uint16_t>((max_rows_ + kGuardRows) * n);
    wrong_ = Allocate<unsigned long long>(2);
    Unpack<<<4096, 256, 0, device_.stream>>>(qweight_, scale_, minimum_, w8, n * k);
    Poison<<<1024, 256, 0, device_.stream>>>(want_, (max_rows_ + kGuardRows) * n);
    Reference<<<dim3(static_cast<unsigned>(n / 64), static_cast<unsigned>((max_rows_ + 63) / 64)), 256, 0,
                device_.stream>>>(codes_, w8, token_scale_, channel_scale_, reinterpret_cast<__nv_bfloat16*>(want_),
                                  max_rows_, n, k);
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
    cudaFree(w8);
  }

  const Device& device_;
  Shape shape_;
  int64_t max_rows_;
  GemmOutput output_;
  std::vector<uint8_t*> blocks_;
  uint8_t *qweight_, *scale_;
  int8_t *minimum_, *codes_;
  float *token_scale_, *channel_scale_;
  int32_t *code_sums_, *arrivals_;
  int64_t* clock_;
  uint16_t *out_, *want_ = nullptr;
  unsigned long long* wrong_ = nullptr;
};

std::vector<std::string> Words(const std::string& list) {
  std::vector<std::string> words(1);
  for (char c : list) {
    if (c == ',') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}
std::vector<int64_t> Numbers(const std::string& list) {
  std::vector<int64_t> numbers;
  for (const std::string& word : Words(list)) numbers.push_back(std::atoll(word.c_str()));
  return numbers;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "check") {
      options.check = Numbers(value);
    } else if (name == "m") {
      options.rows = Numbers(value);
    } else if (name == "shapes") {
      options.shapes = Words(value);
    } else if (name == "tune") {
      options.tune = value;
    } else if (name == "json") {
      options.json = value;
    } else if (name == "only") {
      options.only = Words(value);
    } else if (name == "cublas") {
      options.cublas = value != "0";
    } else if (name == "a4") {
      options.four_bits = value != "0";
    } else if (name == "silu") {
      options.silu = value != "0";
    } else if (name == "pack") {
      options.pack = value != "0";
    } else if (name == "pause_ms") {
      options.pause_ms = std::atoi(value.c_str());
    } else if (name == "repeats") {
      options.repeats = std::atoi(value.c_str());
    } else if (name == "replays") {
      options.replays = std::atoi(value.c_str());
    } else {
      std::fprintf(stderr, "unknown option %s\n", argument.c_str());
      std::exit(2);
    }
  }
  return options;
}

// Bytes are those of the checkpoint: codes, scales and minima. `copy`: the same bytes through staging alone.
void TimePack(const Device& device, const Shape& shape, int replays) {
  const int64_t n = shape.n, k = shape.k, groups = n * k / kBlock, bytes = n * k / 2 + 2 * groups;
  const std::vector<uint8_t> qweight(n * k / 2, 0x5a), scale(groups, 8);
  const std::vector<int8_t> minimum(groups, -60);
  const std::vector<float> channel_scale(n, 0.001f);
  const W4View view = {n, k, qweight.data(), scale.data(), minimum.data(), channel_scale.data()};
  Staging staging(device.stream);
  const auto milliseconds = [&](auto&& work) {
    std::vector<double> times;
    for (int i = 0; i < replays + 1; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      work();
      NIBBLE_CUDA_CHECK(cudaStreamSynchronize(device.stream));
      times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  const double pack_ms = milliseconds([&] { NIBBLE_CHECK(PackW4Ax(device, staging, {&view, 1}).ok()); });
  uint8_t* logical = Allocate<uint8_t>(bytes);
  uint8_t* blocks = Allocate<uint8_t>(W4AxBytes(n, k));
  const double copy_ms = milliseconds([&] { NIBBLE_CUDA_CHECK(staging.Upload(logical, qweight.data(), qweight.size())); });
  const W4View on_device = {n, k, logical, logical + n * k / 2, reinterpret_cast<int8_t*>(logical + n * k / 2 + groups),
                            nullptr};
  const double kernel_us = TimeGraph(device.stream, 5, replays, [&](int) {
    LaunchW4AxRelayout(device.stream, on_device, {}, blocks);
  });
  cudaFree(logical);
  cudaFree(blocks);
  std::printf("pack %-12s %7.1f MB  kernel %7.1f us %6.0f GB/s  with upload %7.1f ms %5.1f GB/s  copy %5.1f GB/s\n", shape.name,
              bytes * 1e-6, kernel_us, bytes / kernel_us * 1e-3, pack_ms, bytes / pack_ms * 1e-6,
              static_cast<double>(qweight.size()) / copy_ms * 1e-6);
}

void PrintTable(const std::vector<Result>& results) {
  std::printf("%-12s %5s %9s %5s %6s %5s %5s %9s %9s %6s %6s  %s\n", "shape", "rows", "us", "MHz", "GB/s", "mem%", "TOPS",
              "bf16 us", "fp8 us", "x bf16", "x fp8", "plan");
  for (const Result& r : results) {
    const double bytes = static_cast<double>(W4AxBytes(r.n, r.k));
    std::printf("%-12s %5ld %9.1f %5.0f %6.0f %5.0f %5.0f %9.1f %9.1f %6.2f %6.2f  %s\n", r.shape.c_str(), r.rows, r.us, r.mhz,
                bytes / r.us * 1e-3, 100 * bytes / r.us / kMemoryBytesPerUs, 2e-6 * r.rows * r.n * r.k / r.us, r.bf16_us,
                r.fp8_us, r.bf16_us / r.us, r.fp8_us / r.us, r.plan.c_str());
  }
  std::map<std::string, std::array<double, 3>> means;  // by group of shapes: log sums and count, rows 16..256
  for (const Result& r : results) {
    if (r.rows < 16 || r.rows > 256 || r.bf16_us == 0 || r.fp8_us == 0) continue;
    const size_t dot = r.shape.find('.');
    auto& mean = means[dot == std::string::npos ? "70b" : r.shape.substr(0, dot)];
    mean[0] += std::log(r.bf16_us / r.us);
    mean[1] += std::log(r.fp8_us / r.us);
    mean[2] += 1;
  }
  for (const auto& [group, mean] : means) {
    std::printf("geometric mean, %s, rows 16..256: %.3f x bf16, %.3f x fp8 (%.0f cells)\n", group.c_str(),
                std::exp(mean[0] / mean[2]), std::exp(mean[1] / mean[2]), mean[2]);
  }
}

void WriteJson(const std::string& path, const std::vector<Result>& results) {
  std::ofstream out(path);
  out << "[";
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    out << (i > 0 ? ",\n " : "\n ") << "{\"shape\": \"" << r.shape << "\", \"n\": " << r.n << ", \"k\": " << r.k
        << ", \"rows\": " << r.rows << ", \"us\": " << r.us << ", \"mhz\": " << r.mhz << ", \"bf16_us\": " << r.bf16_us
        << ", \"fp8_us\": " << r.fp8_us << ", \"plan\": \"" << r.plan << "\"}";
  }
  out << "\n]\n";
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  cudaDeviceProp properties;
  NIBBLE_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  Device device;
  device.capability = properties.major * 10 + properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  NIBBLE_CUDA_CHECK(cudaStreamCreate(&device.stream));
  device.scratch_bytes = 64 << 20;
  device.scratch = Allocate<uint8_t>(device.scratch_bytes);
  int64_t checked = 0, wrong = 0;
  std::vector<Result> results;
  std::ofstream tune(options.tune);
  for (const Shape& shape : kShapes) {
    if (std::find(options.shapes.begin(), options.shapes.end(), shape.name) == options.shapes.end()) continue;
    int64_t max_rows = 1;
    for (int64_t rows : options.check) max_rows = std::max(max_rows, rows);
    for (int64_t rows : options.rows) max_rows = std::max(max_rows, rows);
    const int64_t bytes = W4AxBytes(shape.n, shape.k);
    const int copies = options.rows.empty() ? 1 : static_cast<int>(std::max<int64_t>(2, kRotatedBytes / bytes + 1));
    if (options.pack) TimePack(device, shape, options.replays);
    if (options.check.empty() && options.rows.empty()) continue;
    Problem problem(device, shape, max_rows, copies, options);
    for (int64_t rows : options.check) {
      for (const GemmPlan& plan : EnumerateGemmPlans(problem.At(rows))) {
        if (!options.Wants(plan)) continue;
        for (int repeat = 0; repeat < options.repeats; ++repeat) {
          ++checked;
          wrong += problem.Check(plan, rows) != 0;
        }
      }
    }
    for (int64_t rows : options.rows) {
      if (!options.tune.empty()) {
        std::vector<std::pair<double, std::string>> times;
        const double picked = PriceGemmPlan(problem.At(rows), PickGemmPlan(problem.At(rows)));
        for (const GemmPlan& plan : EnumerateGemmPlans(problem.At(rows))) {
          if (!options.Wants(plan) || PriceGemmPlan(problem.At(rows), plan) > kHopeless * picked) continue;
          usleep(1000 * options.pause_ms);
          const auto [us, mhz] = problem.Time(plan, rows, options.replays);
          const WorkSplit& s = plan.split;
          tune << shape.name << '\t' << shape.n << '\t' << shape.k << '\t' << rows << '\t' << plan.Config().name << '\t'
               << (s.even ? "even" : s.whole_tiles == s.tiles() ? "whole" : s.whole_tiles > 0 ? "tail" : "stream") << '\t'
               << us << '\t' << mhz << '\t' << PriceGemmPlan(problem.At(rows), plan) << '\t' << s.workers << '\t'
               << s.token_tiles << std::endl;
          times.emplace_back(us, PrintGemmPlan(plan));
        }
        std::sort(times.begin(), times.end());
        std::printf("%s rows %ld: picked %s\n", shape.name, rows, PrintGemmPlan(PickGemmPlan(problem.At(rows))).c_str());
        for (size_t i = 0; i < std::min<size_t>(4, times.size()); ++i) {
          std::printf("    %8.1f us  %s\n", times[i].first, times[i].second.c_str());
        }
        std::fflush(stdout);
        continue;
      }
      usleep(1000 * options.pause_ms);
      const GemmPlan plan = PickGemmPlan(problem.At(rows));
      const auto [us, mhz] = problem.Time(plan, rows, options.replays);
      Result result{shape.name, PrintGemmPlan(plan), shape.n, shape.k, rows, us, mhz, 0, 0};
      if (options.cublas) {
        result.bf16_us = TimeCublas(device, MatmulType::kBF16, shape, rows, options);
        result.fp8_us = TimeCublas(device, MatmulType::kFP8, shape, rows, options);
      }
      results.push_back(result);
    }
  }
  if (!options.check.empty()) std::printf("checked %ld launches bit for bit: %ld wrong\n", checked, wrong);
  if (!results.empty()) PrintTable(results);
  if (!options.json.empty()) WriteJson(options.json, results);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace nibble::cuda::bench

int main(int argc, char** argv) { return nibble::cuda::bench::Main(argc, argv); }
