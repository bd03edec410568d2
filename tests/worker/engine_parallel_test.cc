// One model over 1, 2 and 4 ranks. docs/numerics.md: the same integers in column-parallel layers; in row-parallel ones
// each rank scales its own shard, so sums agree to rounding only.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>

#include "tests/worker/engine_rig.h"
#include "worker/model/weights.h"

namespace nibble::testing {
namespace {

TinyModel FourHeads(Quantization quantization) {
  TinyModel model;
  model.hidden_size = 512;
  model.intermediate_size = 1024;
  model.num_heads = 8;
  model.num_kv_heads = 4;
  model.quantization = quantization;
  return model;
}

std::vector<float> PromptLogprobs(Quantization quantization, int world_size) {
  RigOptions options;
  options.model = FourHeads(quantization);
  options.world_size = world_size;
  Rig rig(options);
  Sequence sequence = RandomSequence(3, 200, rig.config().vocab_size);
  sequence.sampling.set_prompt_logprobs(true);
  return Driver(rig).Run(0, sequence, 1, 128).prompt_logprobs;
}

struct Difference {
  double largest = 0, mean = 0;
};

Difference Compare(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  Difference difference;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(double{a[i]} - b[i]);
    EXPECT_TRUE(std::isfinite(d));
    difference.largest = std::max(difference.largest, d);
    difference.mean += d / static_cast<double>(a.size());
  }
  return difference;
}

TEST(TensorParallel, FloatLogprobsAgree) {
  const std::vector<float> one = PromptLogprobs(Quantization::kBF16, 1);
  for (const int ranks : {2, 4}) {
    const Difference d = Compare(one, PromptLogprobs(Quantization::kBF16, ranks));
    RecordProperty("largest" + std::to_string(ranks), std::to_string(d.largest));
    EXPECT_LT(d.largest, 1e-4) << ranks << " ranks";
  }
}

// A random model has flat logits and no structure, which is the worst case for rounding to spread.
TEST(TensorParallel, QuantizedLogprobsAgreeToRounding) {
  for (const Quantization mode : {Quantization::kW4A8KV4, Quantization::kW4A4KV4}) {
    const std::vector<float> one = PromptLogprobs(mode, 1);
    for (const int ranks : {2, 4}) {
      const Difference d = Compare(one, PromptLogprobs(mode, ranks));
      const double bound = mode == Quantization::kW4A8KV4 ? 0.1 : 0.4;
      EXPECT_LT(d.mean, bound) << QuantizationName(mode) << ", " << ranks << " ranks, largest " << d.largest;
    }
  }
}

TEST(TensorParallel, SameGroupSameBits) {
  for (const int ranks : {2, 4})
    EXPECT_EQ(PromptLogprobs(Quantization::kW4A4KV4, ranks), PromptLogprobs(Quantization::kW4A4KV4, ranks));
}

// Columns [begin, begin + count) of a linear's bf16 output for random codes.
class ColumnOutputs {
 public:
  ColumnOutputs(Ops& ops, int64_t k)
      : ops_(ops), codes_(kRows * k), scales_(kRows), sums_(kRows), exponents_(kRows * k / kBlock) {
    std::mt19937_64 random(17);
    for (int64_t t = 0; t < kRows; ++t) {
      scales_[t] = std::ldexp(1.0f + static_cast<float>(random() % 1000) / 1000, -8);
      for (int64_t i = 0; i < k; ++i)
        sums_[t] += codes_[t * k + i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    }
    input_ = {.rows = kRows,
              .k = k,
              .codes = codes_.data(),
              .scales = scales_.data(),
              .code_sums = sums_.data(),
              .exponents = exponents_.data()};
  }
  std::vector<uint16_t> Run(const Weight& weight) {
    std::vector<uint16_t> out(kRows * weight.n);
    ops_.Linear({.input = input_,
                 .weight = &weight,
                 .out = {.data = out.data(), .dtype = DType::kBF16, .rows = kRows, .cols = weight.n}});
    return out;
  }
  static constexpr int64_t kRows = 9;

 private:
  Ops& ops_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
  std::vector<uint8_t> exponents_;
  LinearInput input_;
};

TEST(TensorParallel, ColumnParallelOutputsAreBitEqual) {
  TempDir dir;
  ASSERT_TRUE(WriteTinyModel(FourHeads(Quantization::kW4A4KV4), dir / "m").ok());
  const auto checkpoint = Checkpoint::Open(dir / "m");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::shared_ptr<Ops> ops = *CreateOps({});
  const auto whole = LoadModel(**checkpoint, ops, 0, 1);
  ASSERT_TRUE(whole.ok()) << whole.status();
  const int64_t d = (*whole)->config.head_dim;
  ColumnOutputs outputs(*ops, (*whole)->config.hidden_size);
  for (const int ranks : {2, 4}) {
    for (int rank = 0; rank < ranks; ++rank) {
      const auto shard = LoadModel(**checkpoint, ops, rank, ranks);
      ASSERT_TRUE(shard.ok()) << shard.status();
      for (size_t layer = 0; layer < (*whole)->layers.size(); ++layer) {
        const LayerWeights &a = (*whole)->layers[layer], &b = (*shard)->layers[layer];
        // The parts of a fused output: {columns of the whole, columns of this rank's share}.
        const std::vector<int64_t> qkv = {(*whole)->q_heads * d, (*whole)->kv_heads * d, (*whole)->kv_heads * d};
        const std::vector<int64_t> gate_up = {(*whole)->intermediate_size, (*whole)->intermediate_size};
        const auto check = [&](const Weight& all, const Weight& part, const std::vector<int64_t>& sizes) {
          const std::vector<uint16_t> x = outputs.Run(all), y = outputs.Run(part);
          for (int64_t t = 0; t < ColumnOutputs::kRows; ++t) {
            int64_t at_all = t * all.n, at_part = t * part.n;
            for (const int64_t size : sizes) {
              const int64_t share = size / ranks;
              EXPECT_EQ(std::memcmp(&x[at_all + rank * share], &y[at_part], share * sizeof(uint16_t)), 0)
                  << "layer " << layer << ", rank " << rank << " of " << ranks << ", row " << t;
              at_all += size;
              at_part += share;
            }
          }
        };
        check(*a.qkv.weight, *b.qkv.weight, qkv);
        check(*a.gate_up.weight, *b.gate_up.weight, gate_up);
      }
    }
  }
}

TEST(TensorParallel, SizesThatDoNotDivideTheModel) {
  TempDir dir;
  ASSERT_TRUE(WriteTinyModel({}, dir / "m").ok());  // 2 KV heads
  const auto checkpoint = Checkpoint::Open(dir / "m");
  const std::shared_ptr<Ops> ops = *CreateOps({});
  for (const auto& [rank, size] :
       std::vector<std::pair<int, int>>{{0, 3}, {0, 4}, {2, 2}, {-1, 2}, {0, 0}, {0, 1000}}) {
    EXPECT_EQ(LoadModel(**checkpoint, ops, rank, size).status().code(), absl::StatusCode::kInvalidArgument)
        << rank << " of " << size;
  }
}

// A vocabulary that no group size divides: every rank computes all of it.
TEST(TensorParallel, VocabularyThatDoesNotDivide) {
  RigOptions options;
  options.model.vocab_size = 321;
  Rig one(options);
  options.world_size = 2;
  Rig two(options);
  const Sequence sequence = RandomSequence(4, 40, 321);
  EXPECT_EQ(Driver(one).Run(0, sequence, 6, 512).token_ids, Driver(two).Run(0, sequence, 6, 512).token_ids);
}

TEST(TensorParallel, AbortEndsAWaitingStep) {
  RigOptions options;
  options.world_size = 2;
  Rig rig(options);
  v1::StepPlan plan;
  plan.set_step(1);
  v1::StartSequence* start = plan.add_start();
  start->add_token_ids(1);
  start->set_num_prompt_tokens(1);
  start->add_page_ids(0);
  *start->mutable_sampling() = GreedySampling();
  plan.add_prefill()->set_num_tokens(1);
  absl::Status status;
  std::jthread rank0([&] {
    v1::StepResult result;
    status = rig.group().engine(0).Execute(plan, &result);  // rank 1 never comes
  });
  rig.group().communicator(0).Abort("the replica is down");
  rank0.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
}

}  // namespace
}  // namespace nibble::testing
