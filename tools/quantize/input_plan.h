// FMPQ (COMET, section 4): which input channels of a linear go where, and which 128-blocks of them get 8 bits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble {

// The static coding of one linear input.
struct InputPlan {
  std::vector<uint8_t> block_bits;  // [K/128] 4 or 8
  std::vector<int32_t> perm;        // [K] or empty: code i is made from input channel perm[i]
};

// Every block in 8 bits, channels in place (W4A8).
InputPlan EightBitPlan(int64_t k);

// The most 8-bit blocks an input of k channels may have under `share` of its blocks: share rounded down, but one where
// that is none (a narrow input of four blocks would otherwise have no place for its outliers).
int64_t EightBitBudget(int64_t k, double share);

// The channels of each of `segments` equal parts by falling `importance` [K]: outliers share few blocks and a block
// holds channels of one magnitude. Importance max|x| is COMET's (and QServe's activation-aware reordering), sqrt(E[x²]
// · column energy) says what the output sees. K is a multiple of 128 · segments.
std::vector<int32_t> SortChannels(std::span<const float> importance, int64_t segments);

// The plan with `perm` (empty: channels in place) in which those eight_bit_blocks blocks have 8 bits that lower
// CodingError most: every round codes the samples with the backend and turns the blocks whose error times column energy
// is the largest (not the largest magnitude: an outlier nobody reads, or one that fills its block evenly, needs no
// bits).
absl::StatusOr<InputPlan> PlanByOutputError(Ops* ops, std::span<const float> samples,
                                            std::span<const float> column_energy, std::vector<int32_t> perm,
                                            int64_t eight_bit_blocks);

// What the linear reads instead of `rows` [T, K] when they are coded by `plan`, in channel order. The backend itself
// codes them.
absl::StatusOr<std::vector<float>> CodeRows(Ops* ops, std::span<const float> rows, int64_t k, const InputPlan& plan);

// What coding costs: mean over rows of Σ_k (x̂ − x)²·column_energy / Σ_k x²·column_energy, the relative error of the
// linear's output if channel errors are independent. samples [rows, K] are coded by the backend itself.
absl::StatusOr<double> CodingError(Ops* ops, std::span<const float> samples, std::span<const float> column_energy,
                                   const InputPlan& plan);

}  // namespace nibble
