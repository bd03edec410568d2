// One rank's weights, as the backend wants them. Immutable after LoadModel.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/model/config.h"
#include "kernels/ops.h"
#include "worker/model/engine.h"

namespace nibble {

// How a linear's input is coded, and the device tables behind it.
struct CodedInput {
  InputCoding coding;
  Buffer block_bits;
  Buffer perm;
};

// One or several projections of the same input, stacked along N.
struct FusedLinear {
  std::unique_ptr<Weight> weight;
  Buffer bias;  // f32 [N], empty when no projection has one
};

struct LayerWeights {
  Buffer input_norm;  // bf16 [H]
  CodedInput qkv_input;
  FusedLinear qkv;  // q heads, k heads, v heads of this rank
  CodedInput o_input;
  FusedLinear o;               // row-parallel: a partial sum of [H]
  Buffer post_attention_norm;  // bf16 [H]
  CodedInput gate_up_input;
  FusedLinear gate_up;  // gate [F], up [F] of this rank
  CodedInput down_input;
  FusedLinear down;  // row-parallel: a partial sum of [H]
};

class Model {
 public:
  ModelConfig config;
  std::shared_ptr<Ops> ops;  // outlives the buffers below
  int rank = 0;
  int world_size = 1;

  // This rank's share.
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  int64_t intermediate_size = 0;
  int64_t head_columns = 0;  // of the vocabulary; all of it when world_size does not divide it

  DType activations = DType::kBF16;
  KvFormat kv_format = KvFormat::kKV4;

  Buffer embedding;  // bf16 [V, H], whole on every rank
  Buffer rope;       // f32 [max positions, D]
  std::vector<LayerWeights> layers;
  Buffer final_norm;      // bf16 [H]
  CodedInput head_input;  // dense
  FusedLinear head;       // [head_columns, H]

  KvLayout kv_layout() const { return {.format = kv_format, .kv_heads = kv_heads, .head_dim = config.head_dim}; }
};

}  // namespace nibble
