#include "tests/kernels/cuda/attention_workload.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nibble::cuda {
namespace {

__device__ uint32_t Hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Codes and parameters such that dequantized values have about the size of real keys and values.
__global__ void FillPages(uint32_t* words, int64_t heads, int head_dim, uint32_t seed, float key_factor) {
  const int64_t head_words = (64 * head_dim + 512) / 4, code_words = 64 * head_dim / 4;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < heads * head_words;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t random = Hash(static_cast<uint32_t>(i) * 2654435761u ^ static_cast<uint32_t>(i >> 32) ^ seed);
    const int64_t word = i % head_words;
    if (word < code_words) {
      words[i] = random;
      continue;
    }
    const bool value = (word - code_words) % 2;
    const float scale = (0.1f + 0.2f * ((random & 0xffff) / 65536.0f)) * (value ? 1.0f : key_factor);
    const __half2 pair = __floats2half2_rn(scale, -7.5f * scale + 0.3f * ((random >> 16) / 65536.0f - 0.5f));
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__global__ void PoisonParameters(uint8_t* page, int heads, int head_dim, int token) {
  const int head = blockIdx.x, at = token + threadIdx.x;
  if (at < kTokensPerPage) {
    *reinterpret_cast<uint2*>(page + int64_t{head} * (64 * head_dim + 512) + KvParameters(head_dim, at)) =
        make_uint2(0x7e007e00u, 0xfc007e00u);
  }
}

__global__ void FillNormalKernel(__nv_bfloat16* to, int64_t count, uint32_t seed, float factor) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0;
    for (int k = 0; k < 4; ++k) sum += Hash(static_cast<uint32_t>(i * 4 + k) + seed * 77777u) / 4294967296.0f - 0.5f;
    to[i] = __float2bfloat16(sum * 1.73f * factor);
  }
}

// Counts SM cycles over a stretch of wall-clock time.
__global__ void MeasureClock(double* mhz) {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  const int64_t cycles = clock64();
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < 40000);
  *mhz = (clock64() - cycles) * 1e3 / static_cast<double>(now - begin);
}

std::vector<int32_t> Positions(const std::vector<Part>& parts) {
  std::vector<int32_t> all;
  for (const Part& part : parts) {
    for (int64_t i = 0; i < part.rows; ++i) all.push_back(static_cast<int32_t>(part.position + i));
  }
  return all;
}
std::vector<int32_t> RowSequence(const std::vector<Part>& parts) {
  std::vector<int32_t> all;
  for (size_t s = 0; s < parts.size(); ++s) all.insert(all.end(), parts[s].rows, static_cast<int32_t>(s));
  return all;
}
std::vector<int32_t> RowBegin(const std::vector<Part>& parts) {
  std::vector<int32_t> all = {0};
  for (const Part& part : parts) all.push_back(all.back() + static_cast<int32_t>(part.rows));
  return all;
}

}  // namespace

Cache::Cache(const HeadShape& shape, int64_t pages, uint32_t seed, float key_factor)
    : shape_(shape), num_pages_(pages), bytes_(pages * shape.layout().page_bytes()) {
  FillPages<<<1024, 256>>>(reinterpret_cast<uint32_t*>(bytes_.data()), pages * shape.kv_heads,
                           static_cast<int>(shape.head_dim), seed, key_factor);
  NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
}

void Cache::Poison(int64_t page, int64_t token) const {
  PoisonParameters<<<static_cast<int>(shape_.kv_heads), kTokensPerPage>>>(
      bytes_.data() + page * shape_.layout().page_bytes(), static_cast<int>(shape_.kv_heads),
      static_cast<int>(shape_.head_dim), static_cast<int>(token));
}

Step::Step(const Cache& cache, const std::vector<Part>& parts, const std::vector<int32_t>& tables, int64_t max_pages,
           uint32_t seed)
    : cache_(cache),
      sequences_(static_cast<int64_t>(parts.size())),
      max_pages_(max_pages),
      positions_(Positions(parts)),
      row_sequence_(RowSequence(parts)),
      row_begin_(RowBegin(parts)),
      tables_(tables),
      qkv_(row_count() * cache.shape().qkv_cols()),
      out_(row_count() * cache.shape().out_cols()) {
  FillNormal(qkv_.data(), static_cast<int64_t>(qkv_.count()), seed, 1.0f);
  out_.Fill(0xff);
}

StepRows Step::rows() const {
  return {.rows = row_count(),
          .sequences = sequences_,
          .positions = positions_.data(),
          .row_sequence = row_sequence_.data(),
          .row_begin = row_begin_.data(),
          .page_tables = tables_.data(),
          .max_pages = max_pages_};
}

AttentionArgs Step::args() const {
  const HeadShape& shape = cache_.shape();
  return {.step = rows(),
          .qkv = {qkv_.data(), DType::kBF16, row_count(), shape.qkv_cols()},
          .q_heads = shape.q_heads,
          .pages = cache_.pages(),
          .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim)),
          .out = {out_.data(), DType::kBF16, row_count(), shape.out_cols()}};
}

void FillNormal(uint16_t* to, int64_t count, uint32_t seed, float factor) {
  FillNormalKernel<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(to), count, seed, factor);
  NIBBLE_CUDA_CHECK(cudaDeviceSynchronize());
}

Timing Time(cudaStream_t stream, const std::vector<std::function<void()>>& launches, int repetitions) {
  static double* mhz = [] {
    double* managed;
    NIBBLE_CUDA_CHECK(cudaMallocHost(&managed, sizeof(double)));
    return managed;
  }();
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  NIBBLE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (const auto& launch : launches) launch();
  NIBBLE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  NIBBLE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  NIBBLE_CUDA_CHECK(cudaEventCreate(&begin));
  NIBBLE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> us;
  for (int i = 0; i < repetitions + 2; ++i) {
    NIBBLE_CUDA_CHECK(cudaEventRecord(begin, stream));
    NIBBLE_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    NIBBLE_CUDA_CHECK(cudaEventRecord(end, stream));
    if (i == repetitions + 1) MeasureClock<<<1, 1, 0, stream>>>(mhz);
    NIBBLE_CUDA_CHECK(cudaStreamSynchronize(stream));
    float ms;
    NIBBLE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) us.push_back(ms * 1e3 / static_cast<double>(launches.size()));
  }
  NIBBLE_CUDA_CHECK(cudaGraphExecDestroy(executable));
  NIBBLE_CUDA_CHECK(cudaGraphDestroy(graph));
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  return {median, (us[us.size() * 3 / 4] - us[us.size() / 4]) / median, *mhz};
}

}  // namespace nibble::cuda
