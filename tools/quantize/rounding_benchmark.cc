// nibble-rounding-benchmark: what rounding costs at the shapes of real models, with synthetic weights and correlated
// activations: time and device memory for each linear of one layer, and the whole model by the number of its layers.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "common/base/check.h"
#include "common/base/thread_pool.h"
#include "tools/quantize/gptq.h"
#if NIBBLE_ROUNDING_CUDA
#include "tools/quantize/cuda/rounding_device.h"
#endif

namespace nibble {
namespace {

struct Input {
  const char* name;
  int64_t k;
  std::vector<std::pair<const char*, int64_t>> linears;  // name, N
};
struct ModelShape {
  const char* name;
  int64_t layers;
  std::vector<Input> inputs;
};

std::vector<ModelShape> Shapes() {
  return {{"novelist-17m",
           4,
           {{"qkv", 512, {{"q", 512}, {"k", 256}, {"v", 256}}},
            {"o", 512, {{"o", 512}}},
            {"gate_up", 512, {{"gate", 1536}, {"up", 1536}}},
            {"down", 1536, {{"down", 512}}}}},
          {"llama-3-8b",
           32,
           {{"qkv", 4096, {{"q", 4096}, {"k", 1024}, {"v", 1024}}},
            {"o", 4096, {{"o", 4096}}},
            {"gate_up", 4096, {{"gate", 14336}, {"up", 14336}}},
            {"down", 14336, {{"down", 4096}}}}},
          {"llama-3-70b",
           80,
           {{"qkv", 8192, {{"q", 8192}, {"k", 1024}, {"v", 1024}}},
            {"o", 8192, {{"o", 8192}}},
            {"gate_up", 8192, {{"gate", 28672}, {"up", 28672}}},
            {"down", 28672, {{"down", 8192}}}}}};
}

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// SplitMix64: a value for any index, so that rows can be made in any order by any thread.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
float Bell(uint64_t index) {  // sum of four 16-bit uniforms, about unit variance
  const uint64_t bits = Mix(index);
  const auto part = [&](int i) { return static_cast<float>((bits >> (16 * i)) & 0xffff); };
  return (part(0) + part(1) + part(2) + part(3) - 131070.0f) * (1 / 37837.0f);
}

constexpr int64_t kDirections = 8;

// Tokens [begin, begin + rows) of an input: a few directions shared by all channels, noise, and one channel in two
// hundred thirty times as large. Values are bf16, as linears read them on GPUs.
void MakeActivations(int64_t k, int64_t begin, int64_t rows, ThreadPool* pool, std::vector<float>* x) {
  std::vector<float> mix(static_cast<size_t>(kDirections * k));
  for (size_t i = 0; i < mix.size(); ++i) mix[i] = Bell(0x1000000000 + i);
  x->resize(static_cast<size_t>(rows * k));
  pool->ParallelFor(rows, [&](int64_t t, int) {
    float* const row = x->data() + t * k;
    for (int64_t c = 0; c < k; ++c) row[c] = 0.7f * Bell(static_cast<uint64_t>((begin + t) * k + c));
    for (int64_t d = 0; d < kDirections; ++d) {
      const float strength = 0.5f * Bell(0x2000000000 + static_cast<uint64_t>((begin + t) * kDirections + d));
      for (int64_t c = 0; c < k; ++c) row[c] += strength * mix[static_cast<size_t>(d * k + c)];
    }
    for (int64_t c = 0; c < k; ++c) {
      uint32_t bits;
      const float value = c % 200 == 17 ? 30 * row[c] : row[c];
      std::memcpy(&bits, &value, 4);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
      std::memcpy(row + c, &bits, 4);
    }
  });
}

DenseLinear MakeLinear(const char* name, int64_t n, int64_t k, ThreadPool* pool) {
  DenseLinear linear;
  linear.shape.name = name;
  linear.shape.n = n;
  linear.shape.k = k;
  linear.weight.resize(static_cast<size_t>(n * k));
  pool->ParallelFor(n, [&](int64_t row, int) {
    for (int64_t c = 0; c < k; ++c) {
      linear.weight[static_cast<size_t>(row * k + c)] = 0.02f * Bell(0x3000000000 + static_cast<uint64_t>(row * k + c));
    }
  });
  return linear;
}

InputPlan MakePlan(int64_t k) {
  InputPlan plan{.block_bits = std::vector<uint8_t>(static_cast<size_t>(k / kBlock), 4), .perm = {}};
  for (int64_t c = 0; c < k; ++c) plan.perm.push_back(static_cast<int32_t>((c * 5 + 3) % k));  // 5 is prime to k
  return plan;
}

int64_t TakePeakBytes(RoundingDevice* device) {
#if NIBBLE_ROUNDING_CUDA
  if (auto* gpu = dynamic_cast<cuda::CudaRoundingDevice*>(device)) return gpu->TakePeakBytes();
#endif
  return 0;
}

template <typename T>
T Must(absl::StatusOr<T> value) {
  NIBBLE_CHECK(value.ok(), value.status().ToString());
  return *std::move(value);
}
void Must(const absl::Status& status) { NIBBLE_CHECK(status.ok(), status.ToString()); }

struct Totals {
  double seconds = 0;
  int64_t peak = 0;
};

void Measure(const ModelShape& shape, int64_t sequences, int64_t tokens, const GptqOptions& options,
             RoundingDevice* device, ThreadPool* pool) {
  std::cout << absl::StrFormat("%s: %d x %d tokens, %d row clips, %d refinements\n", shape.name, sequences, tokens,
                               options.row_clips.size(), options.refinements);
  std::cout << absl::StrFormat("  %-8s %6s %6s %10s %10s %10s %10s %10s %10s\n", "linear", "N", "K", "moments s",
                               "factor s", "round s", "peak GB", "error", "nearest");
  Totals total;
  for (const Input& input : shape.inputs) {
    const auto moments = Must(device->CreateMoments(input.k, false));
    double accumulate = 0;
    std::vector<float> x;
    for (int64_t s = 0; s < sequences; ++s) {
      MakeActivations(input.k, s * tokens, tokens, pool, &x);
      const double start = Now();
      Must(device->Accumulate(x, moments.get()));
      accumulate += Now() - start;
    }
    const InputPlan plan = MakePlan(input.k);
    const GptqOptions nearest_options{.compensate = false};
    std::vector<double> nearest;
    std::vector<DenseLinear> linears;
    for (const auto& [name, n] : input.linears) linears.push_back(MakeLinear(name, n, input.k, pool));
    {
      const auto factor = Must(device->Factorize(*moments, plan, nearest_options));
      for (const DenseLinear& linear : linears) {
        nearest.push_back(
            Must(device->Round(linear, plan, *moments, *factor, nearest_options)).report.relative_error());
      }
    }
    TakePeakBytes(device);
    double start = Now();
    const auto factor = Must(device->Factorize(*moments, plan, options));
    const double factorize = Now() - start;
    int64_t peak = TakePeakBytes(device);
    total.seconds += accumulate + factorize;
    total.peak = std::max(total.peak, peak);
    std::cout << absl::StrFormat("  %-8s %6s %6d %10.3f %10.3f %10s %10.2f\n", input.name, "", input.k, accumulate,
                                 factorize, "", static_cast<double>(peak) / 1e9);
    for (size_t i = 0; i < linears.size(); ++i) {
      start = Now();
      const RoundedLinear rounded = Must(device->Round(linears[i], plan, *moments, *factor, options));
      const double seconds = Now() - start;
      peak = TakePeakBytes(device);
      total.seconds += seconds;
      total.peak = std::max(total.peak, peak);
      std::cout << absl::StrFormat("  %-8s %6d %6d %10s %10s %10.3f %10.2f %10.6f %10.6f %s\n", linears[i].shape.name,
                                   linears[i].shape.n, input.k, "", "", seconds, static_cast<double>(peak) / 1e9,
                                   rounded.report.relative_error(), nearest[i], rounded.report.fallback);
    }
    std::cout << std::flush;
  }
  std::cout << absl::StrFormat(
      "  layer: %.2f s, peak %.2f GB; %d layers: %.1f min (rounding alone: no forward pass, no files)\n", total.seconds,
      static_cast<double>(total.peak) / 1e9, shape.layers, total.seconds * static_cast<double>(shape.layers) / 60);
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  nibble::RoundingDeviceOptions device_options{
      .device = "cpu", .threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};
  nibble::GptqOptions options;
  std::vector<std::string> shapes = {"novelist-17m"};
  int64_t sequences = 128, tokens = 2048;
  CLI::App app("Measures Nibble's rounding at the shapes of real models, with synthetic weights and activations.");
  app.add_option("--device", device_options.device, "cpu or cuda")->capture_default_str();
  app.add_option("--threads", device_options.threads, "CPU threads")->capture_default_str();
  app.add_option("--shape", shapes, "novelist-17m, llama-3-8b, llama-3-70b; several may be given")
      ->capture_default_str();
  app.add_option("--sequences", sequences, "Calibration sequences")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--tokens", tokens, "Tokens of each")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--clips", options.row_clips, "Candidates for the row scale")->capture_default_str();
  app.add_option("--refinements", options.refinements, "Rounds of coordinate descent")
      ->check(CLI::Range(0, 16))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  auto device = nibble::CreateRoundingDevice(device_options);
  if (!device.ok()) {
    std::cerr << "nibble-rounding-benchmark: " << device.status().message() << "\n";
    return 1;
  }
  std::cout << (*device)->Describe() << "\n";
  nibble::ThreadPool pool(device_options.threads);
  for (const std::string& name : shapes) {
    bool found = false;
    for (const nibble::ModelShape& shape : nibble::Shapes()) {
      if (name != shape.name) continue;
      nibble::Measure(shape, sequences, tokens, options, device->get(), &pool);
      found = true;
    }
    if (!found) {
      std::cerr << "nibble-rounding-benchmark: shape is \"" << name
                << "\", must be novelist-17m, llama-3-8b or llama-3-70b\n";
      return 1;
    }
  }
  return 0;
}
