// A model directory: config + tensors, logical (backend-neutral, unsharded), quantized or not. docs/formats.md is the
// contract of the quantized layout.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/float16.h"
#include "common/model/config.h"
#include "common/model/safetensors.h"

namespace nibble {

// One linear layer [N, K], whole or a tensor-parallel shard of it. Owns its data (a shard is a copy).
struct LinearTensors {
  std::string name;                    // "model.layers.0.self_attn.q_proj"
  int64_t n = 0;
  int64_t k = 0;
  bool quantized = false;
  std::vector<BF16> dense;             // [N, K] when not quantized
  std::vector<uint8_t> qweight;        // [N, K/2], low nibble = even k
  std::vector<uint8_t> group_scale;    // [N, K/128]
  std::vector<int8_t> group_min;       // [N, K/128]
  std::vector<float> channel_scale;    // [N]
  std::vector<uint8_t> block_bits;     // [K/128], 4 or 8
  std::vector<int32_t> input_perm;     // [K] or empty
  std::vector<float> bias;             // [N] or empty
};

// Which part of a linear a rank holds.
enum class ShardAxis : uint8_t {
  kNone,      // all of it
  kColumns,   // split N: q/k/v by heads, gate, up, lm_head
  kRows,      // split K: o_proj, down_proj; block_bits and input_perm are cut and rebased to the shard
};

class Checkpoint {
 public:
  // Opens and validates config and every tensor the config implies (names, types, shapes, value ranges of small
  // tensors). Errors name file, tensor and reason.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& dir);

  const ModelConfig& config() const { return config_; }
  const SafeTensors& tensors() const { return *tensors_; }
  // Stable over file order and location: of config and tensor headers. Ranks of a replica must agree on it.
  std::string Fingerprint() const;

  // Rank `rank` of `world`'s part of a linear. Value ranges are checked here (scales finite, perm inside its segment).
  absl::StatusOr<LinearTensors> Linear(const std::string& name, ShardAxis axis, int rank, int world) const;
  // A bf16 vector or matrix kept unquantized (norms, embedding). Converted from f32/f16 when stored so.
  absl::StatusOr<std::vector<BF16>> Dense(const std::string& name, std::span<const int64_t> shape) const;

 private:
  Checkpoint() = default;
  std::string dir_;
  ModelConfig config_;
  std::unique_ptr<SafeTensors> tensors_;
};

}  // namespace nibble
