#include "kernels/cuda/cluster_launch.h"
#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/sampling/cut.cuh"
#include "kernels/cuda/sampling/sampling.h"

namespace nibble::cuda {
namespace {

constexpr int kDrawBlock = 64;
constexpr int kDrawLanes = 16;
// Bounds of a Gumbel number of 31 random bits: -Log(2^-32) = 22.18..., -Log(-Log(2^-24)) = -2.81...
constexpr float kLargestGumbel = 22.5f;
constexpr float kSmallestGumbel = -3.0f;

struct SampleMemory {
  ReduceMemory reduce;
  CutMemory cut;
  uint64_t best[kMaxTopLogprobs];  // of this block, then of the row
  int found;
};

// NaN to -inf, +inf to FLT_MAX.
__device__ __forceinline__ float Sane(float x) { return x > MinusInfinity() ? fminf(x, 0x1.fffffep127f) : MinusInfinity(); }

__device__ __forceinline__ int CheckedId(int id, int64_t vocab) {
  if (id < 0 || id >= vocab) __trap();
  return id;
}

// What the row asks for must have been given.
__device__ void CheckRow(const SampleArgs& args, const SampleRow& p) {
  const bool logprobs = args.logprobs != nullptr && args.top_ids != nullptr && args.top_logprobs != nullptr;
  if (p.num_logprobs > kMaxTopLogprobs || (p.num_logprobs >= 0 && !logprobs)) __trap();
  if (p.slot >= 0 && args.slot_tokens == nullptr) __trap();
  if (p.history >= 0 && args.history == nullptr) __trap();
  if (!(p.temperature >= 0)) __trap();
}

// Philox4x32-10 (Salmon et al., SC'11) of counter (c0, c1, 0, 0).
__device__ __forceinline__ uint4 Philox(uint64_t seed, uint32_t c1, uint32_t c0) {
  uint4 c = {c0, c1, 0, 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xd2511f53u, c.x), low0 = 0xd2511f53u * c.x;
    const uint32_t high1 = __umulhi(0xcd9e8d57u, c.z), low1 = 0xcd9e8d57u * c.z;
    c = {high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

__device__ __forceinline__ float Gumbel(uint32_t random) {
  const float v = __fmaf_rn(static_cast<float>(static_cast<int>(random >> 1)), 0x1p-31f, 0x1p-32f);
  return 0.0f - Log(NegLogOneMinus(fminf(v, 1.0f - 0x1p-24f)));
}

// One row, seen by one block of its cluster. Methods are called by all threads of all its blocks.
class RowSampler {
 public:
  __device__ RowSampler(const SampleArgs& args, int64_t row, const SampleRow& p, Segment segment, RowCluster cluster,
                        SampleMemory* memory)
      : args_(args), row_(row), p_(p), segment_(segment), cluster_(cluster), memory_(memory),
        cuts_(&memory->cut, cluster_, segment_) {}

  __device__ void Run() {
    Load();
    float max = 0, log_sum = 0;
    if (p_.num_logprobs >= 0) {
      max = ValueOfKey(segment_.KeyOf(Best()));
      if (max != MinusInfinity()) log_sum = LogSum(max);
      WriteTop(max, log_sum);
    }
    const int token = p_.target >= 0 ? CheckedId(p_.target, args_.vocab) : Choose();
    if (cluster_.rank() == 0 && threadIdx.x == 0) {
      if (p_.target < 0 && p_.history >= 0) {
        uint16_t* seen = args_.history + p_.history * args_.vocab + token;
        if ((*seen & 0x7fff) != 0x7fff) ++*seen;
      }
      args_.token_ids[row_] = token;
      if (p_.num_logprobs >= 0) args_.logprobs[row_] = Logprob(Sane(Logits()[token]), max, log_sum);
      if (p_.slot >= 0) args_.slot_tokens[p_.slot] = token;
    }
    cluster_.Sync();  // no block ends while another may read its shared memory
  }

 private:
  __device__ const float* Logits() const { return args_.logits + row_ * args_.vocab; }

  static __device__ float Logprob(float x, float max, float log_sum) {
    return x == MinusInfinity() ? x : (x - max) - log_sum;
  }

  // All loads of a batch are under way before the first is stored.
  __device__ void Load() {
    constexpr int kBatch = 8, kStep = 4 * kSampleThreads;
    const Segment s = segment_;
    const float* from = Logits() + s.begin;
    int whole = 0;  // read by fours
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      whole = s.count / 4 * 4;
      for (int begin = 4 * threadIdx.x; begin < whole; begin += kBatch * kStep) {
        float4 x[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = begin + j * kStep;
          if (i < whole) x[j] = __ldcs(reinterpret_cast<const float4*>(from + i));
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = begin + j * kStep;
          if (i < whole) {
            *reinterpret_cast<float4*>(s.values + i) = {Sane(x[j].x), Sane(x[j].y), Sane(x[j].z), Sane(x[j].w)};
          }
        }
      }
    }
    for (int i = whole + threadIdx.x; i < s.count; i += kSampleThreads) s.values[i] = Sane(from[i]);
    __syncthreads();
  }

  // Order of the row's best member.
  __device__ uint64_t Best() {
    const Segment s = segment_;
    uint32_t key = 0;
    int id = 0;
    for (int i = threadIdx.x; i < s.count; i += kSampleThreads) {
      const uint32_t other = OrderedKey(s.values[i]);
      if (other > key) {
        key = other;
        id = s.begin + i;
      }
    }
    return cluster_.Reduce(key == 0 ? 0 : s.Order(key, id), Larger());
  }

  // ---- log-probabilities

  __device__ float LogSum(float max) {
    const Segment s = segment_;
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < s.count; i += kSampleThreads) sum += MassOf(s.values[i] - max);
    return Log(__ull2float_rn(cluster_.Reduce(sum, Add())) * 0x1p-40f);
  }

  __device__ void WriteTop(float max, float log_sum) {
    int32_t* ids = args_.top_ids + row_ * kMaxTopLogprobs;
    float* logprobs = args_.top_logprobs + row_ * kMaxTopLogprobs;
    const int wanted = p_.num_logprobs < segment_.vocab ? p_.num_logprobs : segment_.vocab;
    if (cluster_.rank() == 0 && threadIdx.x >= wanted && threadIdx.x < kMaxTopLogprobs) {
      ids[threadIdx.x] = -1;
      logprobs[threadIdx.x] = MinusInfinity();
    }
    if (wanted == 0) return;
    const uint64_t cut = cuts_.OfCount(wanted, max);
    if (threadIdx.x == 0) memory_->found = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < segment_.count; i += kSampleThreads) {
      const uint64_t order = segment_.OrderAt(i);
      if (order >= cut) memory_->best[atomicAdd(&memory_->found, 1)] = order;
    }
    cluster_.Sync();
    // Of the `wanted` members in all blocks: every thread places one by counting those before it.
    if (cluster_.rank() == 0 && threadIdx.x < wanted) {
      const uint64_t own = Member(threadIdx.x);
      int place = 0;
      for (int i = 0; i < wanted; ++i) place += Member(i) > own ? 1 : 0;
      ids[place] = segment_.IdOf(own);
      logprobs[place] = Logprob(ValueOfKey(segment_.KeyOf(own)), max, log_sum);
    }
  }

  // Member i of the best lists of all blocks, one after the other.
  __device__ uint64_t Member(int i) const {
    int rank = 0;
    for (; i >= *cluster_.Of(&memory_->found, rank); ++rank) i -= *cluster_.Of(&memory_->found, rank);
    return cluster_.Of(memory_->best, rank)[i];
  }

  // ---- the choice

  __device__ int Choose() {
    Shape();
    const uint64_t best = Best();
    const float max = ValueOfKey(segment_.KeyOf(best));
    if (max == MinusInfinity()) return SmallestAllowed();
    if (p_.temperature == 0.0f) return segment_.IdOf(best);
    const Segment s = segment_;
    const float temperature = p_.temperature;
    for (int i = threadIdx.x; i < s.count; i += kSampleThreads) {
      s.values[i] = __fdiv_rn(s.values[i] - max, temperature);
    }
    __syncthreads();
    uint64_t cut = 0;
    if (p_.top_k > 0 && p_.top_k < segment_.vocab) cut = cuts_.OfCount(p_.top_k, 0.0f);
    if (p_.top_p < 1.0f) cut = cuts_.OfMass(p_.top_p, cut);
    const uint64_t drawn = cluster_.Reduce(Draw(cut), Larger());
    return drawn == 0 ? segment_.IdOf(best) : segment_.IdOf(drawn);  // min_p > 1 keeps nothing
  }

  __device__ void Shape() {
    for (int i = p_.bias_begin + threadIdx.x; i < p_.bias_end; i += kSampleThreads) AddBiases(i);
    if (p_.bias_begin < p_.bias_end) __syncthreads();
    for (int i = p_.suppress_begin + threadIdx.x; i < p_.suppress_end; i += kSampleThreads) {
      const int at = CheckedId(args_.suppress_ids[i], args_.vocab) - segment_.begin;
      if (at >= 0 && at < segment_.count) segment_.values[at] = MinusInfinity();
    }
    __syncthreads();
    if (p_.history < 0) return;
    const uint16_t* history = args_.history + p_.history * args_.vocab + segment_.begin;
    for (int i = threadIdx.x; i < segment_.count; i += kSampleThreads) {
      if (history[i] == 0) continue;
      const int count = history[i] & 0x7fff;
      const float x = segment_.values[i];
      float value = x > 0 ? __fdiv_rn(x, p_.repetition_penalty) : x * p_.repetition_penalty;
      value = value - static_cast<float>(count) * p_.frequency_penalty;
      if (count > 0) value = value - p_.presence_penalty;
      segment_.values[i] = Sane(value);
    }
    __syncthreads();
  }

  // All biases of the id of entry i, in list order, by the thread that has its first entry.
  __device__ void AddBiases(int i) {
    const int id = CheckedId(args_.bias_ids[i], args_.vocab), at = id - segment_.begin;
    if (at < 0 || at >= segment_.count) return;
    for (int j = p_.bias_begin; j < i; ++j) {
      if (args_.bias_ids[j] == id) return;
    }
    float value = segment_.values[at];
    for (int j = i; j < p_.bias_end; ++j) {
      if (args_.bias_ids[j] == id) value = Sane(value + args_.bias_values[j]);
    }
    segment_.values[at] = value;
  }

  // This thread's best of the kept members by z + Gumbel number, its order; 0 when there is none.
  __device__ uint64_t Draw(uint64_t cut) const {
    const Segment s = segment_;
    float bound = kSmallestGumbel;  // the best member, z = 0, scores more than this
    uint32_t best_key = 0;
    int best_id = 0;
    const int lane = threadIdx.x % kDrawLanes;
    for (int block = threadIdx.x / kDrawLanes; block * kDrawBlock < s.count; block += kSampleThreads / kDrawLanes) {
      float z[4];
      bool any = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = block * kDrawBlock + j * kDrawLanes + lane;
        z[j] = i < s.count ? s.values[i] : MinusInfinity();
        if (z[j] + kLargestGumbel < bound || s.Order(OrderedKey(z[j]), s.begin + i) < cut ||
            (p_.min_p > 0 && Exp(z[j]) < p_.min_p)) {
          z[j] = MinusInfinity();
        }
        any = any || z[j] > MinusInfinity();
      }
      if (!any) continue;
      const uint32_t counter = static_cast<uint32_t>((s.begin / kDrawBlock + block) * kDrawLanes + lane);
      const uint4 words = Philox(p_.seed, static_cast<uint32_t>(p_.position), counter);
      const uint32_t random[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(z[j] > MinusInfinity())) continue;
        const float score = z[j] + Gumbel(random[j]);
        const uint32_t key = OrderedKey(score);
        if (key <= best_key) continue;
        best_key = key;
        best_id = s.begin + block * kDrawBlock + j * kDrawLanes + lane;
        bound = fmaxf(bound, score);
      }
    }
    return best_key == 0 ? 0 : s.Order(best_key, best_id);
  }

  __device__ int SmallestAllowed() {
    uint64_t found = 0;  // V - id
    for (int i = threadIdx.x; i < segment_.count && found == 0; i += kSampleThreads) {
      bool suppressed = false;
      for (int j = p_.suppress_begin; j < p_.suppress_end && !suppressed; ++j) {
        suppressed = args_.suppress_ids[j] == segment_.begin + i;
      }
      if (!suppressed) found = segment_.vocab - segment_.begin - i;
    }
    found = cluster_.Reduce(found, Larger());
    return found == 0 ? 0 : segment_.vocab - static_cast<int>(found);
  }

  const SampleArgs& args_;
  const int64_t row_;
  const SampleRow& p_;
  const Segment segment_;  // loops use a copy, which stays in registers across stores
  RowCluster cluster_;
  SampleMemory* memory_;
  CutFinder cuts_;
};

__global__ __launch_bounds__(kSampleThreads) void SampleKernel(const __grid_constant__ SampleArgs args, int cluster,
                                                               int segment, float* scratch) {
  extern __shared__ float4 values[];
  __shared__ SampleMemory memory;
  GridDependencyWait();
  GridDependencyLaunch();
  const int64_t row = blockIdx.x / cluster;
  const int rank = static_cast<int>(blockIdx.x % cluster), vocab = static_cast<int>(args.vocab);
  const SampleRow p = args.params[row];
  CheckRow(args, p);
  const Segment part = {
      .values = scratch == nullptr ? reinterpret_cast<float*>(values) : scratch + int64_t{blockIdx.x} * segment,
      .count = max(0, min(segment, vocab - rank * segment)),
      .begin = rank * segment,
      .vocab = vocab,
      .id_bits = 32 - __clz(vocab - 1)};
  RowSampler(args, row, p, part, RowCluster(&memory.reduce, rank, cluster), &memory).Run();
}

__global__ void ClearHistoryKernel(uint16_t* history, int64_t vocab) {
  GridDependencyWait();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < vocab) history[i] = 0;
}

__global__ void CountTokensKernel(const __grid_constant__ RecordHistoryArgs args) {
  GridDependencyWait();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.count) return;
  unsigned short* seen = args.history + CheckedId(args.token_ids[i], args.vocab);
  unsigned short before = *seen, expected;
  do {
    expected = before;
    const bool full = (expected & 0x7fff) == 0x7fff;
    const unsigned short after = i < args.num_prompt ? expected | 0x8000 : full ? expected : expected + 1;
    if (after == expected) return;
    before = atomicCAS(seen, expected, after);
  } while (before != expected);
}

}  // namespace

void Sample(const Device& device, const SampleArgs& args) {
  NIBBLE_CHECK(args.vocab < int64_t{1} << 30, "vocabulary of " + std::to_string(args.vocab));
  const SamplePlan plan = PlanSample(args.vocab, device.capability, device.shared_bytes);
  const int64_t scratch_bytes = SampleScratchBytes(args.rows, args.vocab, device.capability, device.shared_bytes);
  AllowSharedMemory(SampleKernel, plan.shared_bytes);
  LaunchClusters(device, plan.cluster, SampleKernel, dim3(static_cast<unsigned>(args.rows * plan.cluster)),
                 dim3(kSampleThreads), plan.shared_bytes, args, plan.cluster, static_cast<int>(plan.segment),
                 plan.in_shared ? nullptr : device.Scratch<float>(scratch_bytes));
}

void RecordHistory(const Device& device, const RecordHistoryArgs& args) {
  constexpr int kThreads = 256;
  const auto blocks = [](int64_t count) { return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)); };
  Launch(device, ClearHistoryKernel, blocks(args.vocab), dim3(kThreads), 0, args.history, args.vocab);
  if (args.count > 0) Launch(device, CountTokensKernel, blocks(args.count), dim3(kThreads), 0, args);
}

}  // namespace nibble::cuda
