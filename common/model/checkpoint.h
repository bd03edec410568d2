// A model directory: config + tensors, logical (backend-neutral, unsharded), quantized or not. docs/formats.md is the
// contract of the quantized layout.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/float16.h"
#include "common/model/config.h"
#include "common/model/safetensors.h"

namespace nibble {

// One linear layer [N, K], whole or a tensor-parallel shard of it. Owns its data (a shard is a copy).
struct LinearTensors {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int64_t n = 0;
  int64_t k = 0;
  bool quantized = false;
  std::vector<BF16> dense;           // [N, K] when not quantized
  std::vector<uint8_t> qweight;      // [N, K/2], low nibble = even k
  std::vector<uint8_t> group_scale;  // [N, K/128]
  std::vector<int8_t> group_min;     // [N, K/128]
  std::vector<float> channel_scale;  // [N]
  std::vector<uint8_t> block_bits;   // [K/128], 4 or 8
  std::vector<int32_t> input_perm;   // [K] or empty
  std::vector<float> bias;           // [N] or empty
};

// Which part of a linear a rank holds.
enum class ShardAxis : uint8_t {
  kNone,     // all of it
  kColumns,  // split N: q/k/v by heads, gate, up, lm_head
  kRows,     // split K: o_proj, down_proj; block_bits and input_perm are cut and rebased to the shard
};

// A linear layer of the model as its config implies it.
struct LinearShape {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int64_t n = 0;
  int64_t k = 0;
  bool bias = false;
  ShardAxis axis = ShardAxis::kColumns;  // how tensor parallelism splits it
  std::string input;                     // linears of equal `input` read the same rows: "model.layers.0.self_attn.qkv"
};

// The decoder's linears, those a quantized checkpoint holds in four bits: q, k, v, o, gate, up, down, layer by layer.
std::vector<LinearShape> DecoderLinears(const ModelConfig& config);
// lm_head, never quantized; reads the embedding's tensor when the two are tied.
LinearShape HeadLinear(const ModelConfig& config);
// Weights kept unquantized that are not linears: the embedding [V, H] and the norms [H].
std::vector<std::pair<std::string, std::vector<int64_t>>> DenseTensors(const ModelConfig& config);

// Segments of a row-parallel input (o_proj, down_proj) that a channel permutation stays inside: the least common
// multiple of the tensor-parallel sizes up to 8 that divide the KV heads and leave every rank whole 128-blocks.
int64_t RowSegments(const ModelConfig& config);

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
  // kColumns takes rows [rank·N/world, (rank+1)·N/world), whole heads for q, k and v. lm_head's N need not divide:
  // every rank gets ceil(V/world) rows, those past the vocabulary (the end of the last ranks) are zero; n says so, and
  // the ranks' outputs side by side are the vocabulary in order. kRows takes columns; a bias then stays with rank 0
  // (outputs are summed over ranks). INVALID_ARGUMENT when the size does not divide, or when a rank of a quantized
  // linear would not hold whole 128-blocks.
  absl::StatusOr<LinearTensors> Linear(const std::string& name, ShardAxis axis, int rank, int world) const;
  // A bf16 vector or matrix kept unquantized (norms, embedding). Converted from f32/f16 when stored so. Values are
  // finite.
  absl::StatusOr<std::vector<BF16>> Dense(const std::string& name, std::span<const int64_t> shape) const;

 private:
  Checkpoint() = default;
  absl::Status Validate() const;
  absl::Status ValidateQuantized(const LinearShape& shape) const;

  std::string dir_;
  ModelConfig config_;
  std::unique_ptr<SafeTensors> tensors_;
};

}  // namespace nibble
