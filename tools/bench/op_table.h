// Which operators `nibble-bench op` measures, on which shapes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

// One rank's part of a model.
struct OpModel {
  std::string name;  // "70b", "70b.tp2"
  int64_t hidden = 0, ffn = 0;
  int64_t q_heads = 0, kv_heads = 0, head_dim = 128;
  int64_t vocab = 0;  // of this rank's lm_head; the sampler's is `full_vocab`
  int64_t full_vocab = 0;
};

// The models' names in the order of the table.
const std::vector<OpModel>& OpModels();

// One line of the result.
struct OpSpec {
  std::string op;       // "linear", "lm_head", "attention", ...
  OpModel model;
  // linear: "qkv", "o", "gate_up", "down"; sample: "greedy", "top_p", ...; attention: "4k", "ragged", "mixed"; coded rows: "a4" (most
  // blocks in four bits), "a8", and a4 behind a permutation or a Hadamard transform
  std::string variant;
  int64_t rows = 0;     // T; sequences of a decode step
  int64_t context = 0;  // attention: tokens of each sequence; 0 where lengths differ

  std::string Shape() const { return variant.empty() ? model.name : model.name + "." + variant; }
};

struct OpFilter {
  std::vector<std::string> ops;     // empty: all
  std::vector<std::string> shapes;  // names of models; of "70b" when empty
  std::vector<int64_t> rows;        // empty: the operator's own
};

// INVALID_ARGUMENT names the operator or shape that does not exist and those that do.
absl::StatusOr<std::vector<OpSpec>> SelectOps(const OpFilter& filter);

}  // namespace nibble
