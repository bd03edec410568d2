// What the quantizer may do to a model, each idea switchable by name: `--preset best --set gptq=off`. The names are
// recorded in the checkpoint and identify an interrupted run.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "tools/quantize/gptq.h"

namespace nibble {

// Static order of a linear's input channels (FMPQ's permutation, QServe's activation-aware reordering).
enum class ChannelOrder : uint8_t {
  kOff,
  kMagnitude,  // falling max|x|, as both papers
  kEnergy,     // falling sqrt(E[x²] · column energy): what the output sees
};

// Orthogonal basis of the residual stream (R1 of QuaRot, section 4).
enum class ResidualRotation : uint8_t {
  kOff,
  kHadamard,   // random signs, then Hadamard over the whole hidden size
  kPrincipal,  // principal directions of the normed residual first, then Hadamard inside 8- and 4-bit parts (ResQ)
};

struct QuantizeSettings {
  // Transforms, function-preserving.
  ResidualRotation rotate_residual = ResidualRotation::kOff;
  bool rotate_heads = false;    // Hadamard on every value head and the o_proj channels it reaches (R2)
  bool rotate_down = false;     // online block-Hadamard in front of down_proj (R4)
  bool sort_neurons = false;    // feed-forward neurons in falling order of what they contribute
  double smooth_attention = 0;  // exponent of max|k| that keys are divided by, 0 = off (SmoothAttention of QServe)
  double smooth_output = 0;     // the same for the channels of o_proj and down_proj (QServe), 0 = off
  int64_t seed = 1;             // of the random signs

  // Weights.
  bool clip_search = false;  // clips of rows and groups, by output error; otherwise the plain grid of numerics.md
  bool gptq = false;         // compensate every column's rounding in the columns to come
  RoundingOrder gptq_order = RoundingOrder::kByGroup;
  double damp = 0.01;           // of GPTQ's Hessian, relative to its mean diagonal
  int64_t refinements = 0;      // rounds of coordinate descent after the sweep
  bool coded_inputs = false;    // the Hessian sees inputs as they are coded, and rounding aims at the uncoded output
  bool quantized_flow = false;  // a layer is calibrated on what the quantized layers before it give, not the float ones

  // Activations of w4a4kv4.
  ChannelOrder permute = ChannelOrder::kOff;
  double eight_bit_share = 0.0;  // largest share of an input's blocks in 8 bits; 0: none, otherwise one at least
};

// "best", "balanced", "fast" or "none" (round to nearest, nothing else). INVALID_ARGUMENT lists the names.
absl::StatusOr<QuantizeSettings> PresetSettings(const std::string& name);

// Applies "name=value": INVALID_ARGUMENT with the name, the value and what it may be.
absl::Status SetSetting(const std::string& assignment, QuantizeSettings* settings);

// Every setting by name, as SetSetting reads it.
std::map<std::string, std::string> SettingValues(const QuantizeSettings& settings);

// One line per setting: name, values, meaning, and what it is in `settings`.
std::string DescribeSettings(const QuantizeSettings& settings);

}  // namespace nibble
