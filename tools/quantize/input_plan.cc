#include "tools/quantize/input_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {

InputPlan EightBitPlan(int64_t k) {
  NIBBLE_CHECK_EQ(k % kBlock, 0);
  return {.block_bits = std::vector<uint8_t>(static_cast<size_t>(k / kBlock), 8), .perm = {}};
}

InputPlan PlanInput(std::span<const float> importance, int64_t segments, int64_t eight_bit_blocks) {
  const int64_t k = static_cast<int64_t>(importance.size()), segment = k / segments, blocks = segment / kBlock;
  NIBBLE_CHECK(segments > 0 && k % (segments * kBlock) == 0);
  NIBBLE_CHECK(eight_bit_blocks >= 0 && eight_bit_blocks <= k / kBlock);

  InputPlan plan;
  plan.perm.resize(static_cast<size_t>(k));
  std::iota(plan.perm.begin(), plan.perm.end(), 0);
  for (int64_t s = 0; s < segments; ++s) {
    const auto begin = plan.perm.begin() + static_cast<ptrdiff_t>(s * segment);
    std::stable_sort(begin, begin + static_cast<ptrdiff_t>(segment), [&](int32_t a, int32_t b) {
      return importance[static_cast<size_t>(a)] > importance[static_cast<size_t>(b)];
    });
  }

  plan.block_bits.assign(static_cast<size_t>(k / kBlock), 4);
  const auto block_energy = [&](int64_t block) {
    double energy = 0;
    for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
      const double x = importance[static_cast<size_t>(plan.perm[static_cast<size_t>(i)])];
      energy += x * x;
    }
    return energy;
  };
  std::vector<int64_t> taken(static_cast<size_t>(segments), 0);  // 8-bit blocks stand first in their segment
  for (int64_t given = 0; given < eight_bit_blocks; ++given) {
    int64_t best = -1;
    double best_energy = -1;
    for (int64_t s = 0; s < segments; ++s) {
      if (taken[static_cast<size_t>(s)] == blocks) continue;
      const double energy = block_energy(s * blocks + taken[static_cast<size_t>(s)]);
      if (energy > best_energy) best = s, best_energy = energy;
    }
    plan.block_bits[static_cast<size_t>(best * blocks + taken[static_cast<size_t>(best)]++)] = 8;
  }
  return plan;
}

absl::StatusOr<double> CodingError(Ops* ops, std::span<const float> samples, std::span<const float> column_energy,
                                   const InputPlan& plan) {
  const int64_t k = static_cast<int64_t>(column_energy.size());
  const int64_t rows = static_cast<int64_t>(samples.size()) / k;
  const int64_t blocks = k / kBlock;
  NIBBLE_CHECK_EQ(static_cast<int64_t>(plan.block_bits.size()), blocks);

  // The backend reads bf16 or f32 rows from its own memory.
  NIBBLE_ASSIGN_OR_RETURN(const Buffer in, ops->Allocate(static_cast<size_t>(rows * k) * sizeof(float)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer bits, ops->Allocate(static_cast<size_t>(blocks)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer perm, ops->Allocate(static_cast<size_t>(k) * sizeof(int32_t)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer codes, ops->Allocate(static_cast<size_t>(rows * k)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer scales, ops->Allocate(static_cast<size_t>(rows) * sizeof(float)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer sums, ops->Allocate(static_cast<size_t>(rows) * sizeof(int32_t)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer exponents, ops->Allocate(static_cast<size_t>(rows * blocks)));
  ops->Upload(in.data(), samples.data(), samples.size_bytes());
  ops->Upload(bits.data(), plan.block_bits.data(), plan.block_bits.size());
  if (!plan.perm.empty()) ops->Upload(perm.data(), plan.perm.data(), plan.perm.size() * sizeof(int32_t));

  const InputCoding coding = {.k = k,
                              .quantized = true,
                              .block_bits = bits.as<uint8_t>(),
                              .perm = plan.perm.empty() ? nullptr : perm.as<int32_t>()};
  LinearInput coded = {.rows = rows,
                       .k = k,
                       .codes = codes.as<int8_t>(),
                       .scales = scales.as<float>(),
                       .code_sums = sums.as<int32_t>(),
                       .exponents = exponents.as<uint8_t>()};
  ops->Quantize(
      {.in = {.data = in.data(), .dtype = DType::kF32, .rows = rows, .cols = k}, .coding = &coding, .out = &coded});
  std::vector<int8_t> host_codes(static_cast<size_t>(rows * k));
  std::vector<float> host_scales(static_cast<size_t>(rows));
  ops->Download(host_codes.data(), codes.data(), host_codes.size());
  ops->Download(host_scales.data(), scales.data(), host_scales.size() * sizeof(float));

  double total = 0;
  int64_t counted = 0;
  for (int64_t t = 0; t < rows; ++t) {
    double error = 0, energy = 0;
    for (int64_t i = 0; i < k; ++i) {
      const size_t channel = static_cast<size_t>(plan.perm.empty() ? i : plan.perm[static_cast<size_t>(i)]);
      const float x = samples[static_cast<size_t>(t * k) + channel];
      const float coded_x =
          host_scales[static_cast<size_t>(t)] * static_cast<float>(host_codes[static_cast<size_t>(t * k + i)]);
      const float weight = column_energy[channel];
      error += static_cast<double>((coded_x - x) * (coded_x - x) * weight);
      energy += static_cast<double>(x * x * weight);
    }
    if (energy > 0) total += error / energy, ++counted;
  }
  return counted == 0 ? 0.0 : total / static_cast<double>(counted);
}

absl::StatusOr<std::vector<int64_t>> AllocateEightBitBlocks(std::span<const BlockBidder> bidders, int64_t budget) {
  struct State {
    int64_t blocks = 0;
    double error = 0, next_error = 0;  // with `blocks`, and with one more
  };
  std::vector<State> states(bidders.size());
  int64_t given = 0;
  const auto look_ahead = [&](size_t i) -> absl::Status {
    State& state = states[i];
    state.next_error = state.error;
    if (state.blocks < bidders[i].at_most) {
      NIBBLE_ASSIGN_OR_RETURN(state.next_error, bidders[i].error(state.blocks + 1));
    }
    return absl::OkStatus();
  };
  for (size_t i = 0; i < bidders.size(); ++i) {
    NIBBLE_CHECK(bidders[i].at_least >= 0 && bidders[i].at_least <= bidders[i].at_most, bidders[i].name);
    states[i].blocks = bidders[i].at_least;
    given += states[i].blocks;
    NIBBLE_ASSIGN_OR_RETURN(states[i].error, bidders[i].error(states[i].blocks));
    NIBBLE_RETURN_IF_ERROR(look_ahead(i));
  }
  for (; given < budget; ++given) {
    size_t best = bidders.size();
    double best_gain = 0;
    for (size_t i = 0; i < bidders.size(); ++i) {
      const double gain = (states[i].error - states[i].next_error) * bidders[i].worth;
      if (states[i].blocks < bidders[i].at_most && gain > best_gain) best = i, best_gain = gain;
    }
    if (best == bidders.size()) break;  // nothing helps any more
    ++states[best].blocks;
    states[best].error = states[best].next_error;
    NIBBLE_RETURN_IF_ERROR(look_ahead(best));
  }
  std::vector<int64_t> blocks;
  for (const State& state : states) blocks.push_back(state.blocks);
  return blocks;
}

}  // namespace nibble
