#include "tools/quantize/input_plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {
namespace {

// CodingError's sum, block by block of the code order.
absl::StatusOr<std::vector<double>> BlockErrors(Ops* ops, std::span<const float> samples,
                                                std::span<const float> column_energy, const InputPlan& plan) {
  const size_t k = column_energy.size(), rows = samples.size() / k, block = static_cast<size_t>(kBlock);
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> coded, CodeRows(ops, samples, static_cast<int64_t>(k), plan));
  std::vector<double> errors(k / block, 0.0), of_row(k / block);
  int64_t counted = 0;
  for (size_t t = 0; t < rows; ++t) {
    double energy = 0;
    std::fill(of_row.begin(), of_row.end(), 0.0);
    for (size_t i = 0; i < k; ++i) {
      const size_t channel = plan.perm.empty() ? i : static_cast<size_t>(plan.perm[i]);
      const float x = samples[t * k + channel], difference = coded[t * k + channel] - x;
      of_row[i / block] += static_cast<double>(difference * difference * column_energy[channel]);
      energy += static_cast<double>(x * x * column_energy[channel]);
    }
    if (!(energy > 0)) continue;
    for (size_t b = 0; b < of_row.size(); ++b) errors[b] += of_row[b] / energy;
    ++counted;
  }
  for (double& error : errors) error /= static_cast<double>(std::max<int64_t>(1, counted));
  return errors;
}

}  // namespace

InputPlan EightBitPlan(int64_t k) {
  NIBBLE_CHECK_EQ(k % kBlock, 0);
  return {.block_bits = std::vector<uint8_t>(static_cast<size_t>(k / kBlock), 8), .perm = {}};
}

int64_t EightBitBudget(int64_t k, double share) {
  NIBBLE_CHECK(k > 0 && k % kBlock == 0);
  NIBBLE_CHECK(share >= 0 && share <= 1);
  if (share == 0) return 0;
  return std::max<int64_t>(1, static_cast<int64_t>(std::floor(share * static_cast<double>(k / kBlock))));
}

std::vector<int32_t> SortChannels(std::span<const float> importance, int64_t segments) {
  const int64_t k = static_cast<int64_t>(importance.size());
  NIBBLE_CHECK(segments > 0 && k % (segments * kBlock) == 0);
  std::vector<int32_t> perm(importance.size());
  std::iota(perm.begin(), perm.end(), 0);
  for (int64_t s = 0; s < segments; ++s) {
    const auto begin = perm.begin() + static_cast<ptrdiff_t>(s * (k / segments));
    std::stable_sort(begin, begin + static_cast<ptrdiff_t>(k / segments), [&](int32_t a, int32_t b) {
      return importance[static_cast<size_t>(a)] > importance[static_cast<size_t>(b)];
    });
  }
  return perm;
}

absl::StatusOr<std::vector<float>> CodeRows(Ops* ops, std::span<const float> rows, int64_t k, const InputPlan& plan) {
  const int64_t count = static_cast<int64_t>(rows.size()) / k, blocks = k / kBlock;
  NIBBLE_CHECK_EQ(static_cast<int64_t>(plan.block_bits.size()), blocks);

  // The backend reads bf16 or f32 rows from its own memory.
  NIBBLE_ASSIGN_OR_RETURN(const Buffer in, ops->Allocate(rows.size_bytes()));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer bits, ops->Allocate(static_cast<size_t>(blocks)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer perm, ops->Allocate(static_cast<size_t>(k) * sizeof(int32_t)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer codes, ops->Allocate(rows.size()));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer scales, ops->Allocate(static_cast<size_t>(count) * sizeof(float)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer sums, ops->Allocate(static_cast<size_t>(count) * sizeof(int32_t)));
  NIBBLE_ASSIGN_OR_RETURN(const Buffer exponents, ops->Allocate(static_cast<size_t>(count * blocks)));
  ops->Upload(in.data(), rows.data(), rows.size_bytes());
  ops->Upload(bits.data(), plan.block_bits.data(), plan.block_bits.size());
  if (!plan.perm.empty()) ops->Upload(perm.data(), plan.perm.data(), plan.perm.size() * sizeof(int32_t));

  const InputCoding coding = {.k = k,
                              .quantized = true,
                              .block_bits = bits.as<uint8_t>(),
                              .perm = plan.perm.empty() ? nullptr : perm.as<int32_t>()};
  LinearInput coded = {.rows = count,
                       .k = k,
                       .codes = codes.as<int8_t>(),
                       .scales = scales.as<float>(),
                       .code_sums = sums.as<int32_t>(),
                       .exponents = exponents.as<uint8_t>()};
  ops->Quantize(
      {.in = {.data = in.data(), .dtype = DType::kF32, .rows = count, .cols = k}, .coding = &coding, .out = &coded});
  std::vector<int8_t> host_codes(rows.size());
  std::vector<float> host_scales(static_cast<size_t>(count));
  ops->Download(host_codes.data(), codes.data(), host_codes.size());
  ops->Download(host_scales.data(), scales.data(), host_scales.size() * sizeof(float));

  std::vector<float> values(rows.size());
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    for (size_t i = 0; i < static_cast<size_t>(k); ++i) {
      const size_t channel = plan.perm.empty() ? i : static_cast<size_t>(plan.perm[i]);
      values[t * static_cast<size_t>(k) + channel] =
          host_scales[t] * static_cast<float>(host_codes[t * static_cast<size_t>(k) + i]);
    }
  }
  return values;
}

absl::StatusOr<double> CodingError(Ops* ops, std::span<const float> samples, std::span<const float> column_energy,
                                   const InputPlan& plan) {
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<double> errors, BlockErrors(ops, samples, column_energy, plan));
  return std::accumulate(errors.begin(), errors.end(), 0.0);
}

absl::StatusOr<InputPlan> PlanByOutputError(Ops* ops, std::span<const float> samples,
                                            std::span<const float> column_energy, std::vector<int32_t> perm,
                                            int64_t eight_bit_blocks) {
  const size_t blocks = column_energy.size() / static_cast<size_t>(kBlock);
  NIBBLE_CHECK(eight_bit_blocks >= 0 && eight_bit_blocks <= static_cast<int64_t>(blocks));
  // A block in 8 bits has next to no error, so what it costs in 4 bits is what it gains. The scale of a token follows
  // its largest 4-bit block: every block taken out changes the error of the others, hence rounds.
  constexpr int64_t kRounds = 8;
  InputPlan plan{.block_bits = std::vector<uint8_t>(blocks, 4), .perm = std::move(perm)};
  for (int64_t given = 0; given < eight_bit_blocks;) {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<double> errors, BlockErrors(ops, samples, column_energy, plan));
    std::vector<size_t> order;
    for (size_t b = 0; b < blocks; ++b) {
      if (plan.block_bits[b] == 4) order.push_back(b);
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return errors[a] > errors[b]; });
    const int64_t turn = std::min(eight_bit_blocks - given, (eight_bit_blocks + kRounds - 1) / kRounds);
    for (size_t i = 0; i < static_cast<size_t>(turn); ++i) plan.block_bits[order[i]] = 8;
    given += turn;
  }
  return plan;
}

}  // namespace nibble
