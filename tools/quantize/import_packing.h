// How AutoGPTQ and AutoAWQ lay a 4-bit linear out in safetensors, undone. Both keep, for groups of 128 input channels,
// w = scale · (code − zero) with four-bit codes and zeros and f16 scales; they differ in what eight codes share a word.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "common/model/safetensors.h"

namespace nibble {

enum class PackedFormat : uint8_t {
  // AutoGPTQ (auto_gptq/nn_modules/qlinear): qweight I32 [K/8, N], eight input channels in a word, lowest first; qzeros
  // I32 [K/128, N/8] hold zero − 1; scales F16 [K/128, N]; g_idx I32 [K] names each channel's group.
  kGptq,
  kGptqV2,  // the same with qzeros as they are ("checkpoint_format": "gptq_v2")
  // AutoAWQ, version "gemm" (awq/modules/linear/gemm.py): qweight I32 [K, N/8], eight outputs in a word in the order
  // 0, 2, 4, 6, 1, 3, 5, 7; qzeros I32 [K/128, N/8] likewise; scales F16 [K/128, N].
  kAwq,
};

struct ForeignLinear {
  int64_t n = 0, k = 0;
  std::vector<uint8_t> codes;  // [N, K] 0..15
  std::vector<uint8_t> zeros;  // [N, K/128] 0..16
  std::vector<float> scales;   // [N, K/128] finite, not negative
};

// NOT_FOUND or INVALID_ARGUMENT with the tensor's name for one that is missing, misshapen or out of range;
// UNIMPLEMENTED for a g_idx that scatters groups over the channels (desc_act).
absl::StatusOr<ForeignLinear> UnpackLinear(const SafeTensors& tensors, const LinearShape& shape, PackedFormat format);

}  // namespace nibble
