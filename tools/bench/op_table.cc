#include "tools/bench/op_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace nibble {
namespace {

// The same model cut for `ranks` ranks.
OpModel Shard(OpModel model, int64_t ranks) {
  absl::StrAppend(&model.name, ".tp", ranks);
  model.ffn /= ranks;
  model.q_heads /= ranks;
  model.kv_heads /= ranks;
  model.vocab /= ranks;
  return model;
}

struct OpKind {
  const char* op;
  std::vector<const char*> variants;
  std::vector<int64_t> rows;
};
const std::vector<OpKind>& OpKinds() {
  static const std::vector<OpKind>& kinds = *new std::vector<OpKind>{
      {"linear", {"qkv", "o", "gate_up", "down"}, {1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096}},
      {"lm_head", {""}, {1, 16, 64, 256}},
      {"attention", {"1k", "4k", "16k", "ragged", "mixed"}, {1, 16, 64, 256}},
      {"prefill", {"2k", "8k"}, {2048, 8192}},
      {"embed", {""}, {32, 4096}},
      {"add_norm_quantize", {"a4", "a8", "permuted"}, {32, 4096}},
      {"quantize", {"a4", "a8"}, {32, 4096}},
      {"silu_mul_quantize", {"a4", "a8", "hadamard"}, {32, 4096}},
      {"rope_append", {""}, {32, 4096}},
      {"sample", {"greedy", "temperature", "top_k", "top_p", "logprobs"}, {1, 16, 256}},
      {"record_history", {""}, {8192}},
  };
  return kinds;
}

int64_t ContextOf(const std::string& variant) {
  const size_t k = variant.find('k');
  return k == std::string::npos || k == 0 || variant[0] < '0' || variant[0] > '9' ? 0 : std::stoll(variant) * 1024;
}

template <typename Items, typename Name>
absl::Status CheckNames(const char* field, const std::vector<std::string>& wanted, const Items& items, Name name) {
  std::vector<std::string> known;
  for (const auto& item : items) known.push_back(name(item));
  for (const std::string& one : wanted) {
    if (std::find(known.begin(), known.end(), one) == known.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", field, " has '", one, "', must be some of ", absl::StrJoin(known, ", ")));
    }
  }
  return absl::OkStatus();
}

}  // namespace

const std::vector<OpModel>& OpModels() {
  static const std::vector<OpModel>& models = *[] {
    const OpModel large = {"70b", 8192, 28672, 64, 8, 128, 128256, 128256};
    const OpModel small = {"8b", 4096, 14336, 32, 8, 128, 128256, 128256};
    const OpModel bundled = {"novelist", 512, 1536, 4, 2, 128, 4096, 4096};
    return new std::vector<OpModel>{large,          Shard(large, 2), Shard(large, 4), Shard(large, 8), small,
                                    Shard(small, 2), bundled,        Shard(bundled, 2)};
  }();
  return models;
}

absl::StatusOr<std::vector<OpSpec>> SelectOps(const OpFilter& filter) {
  const std::vector<std::string> shapes = filter.shapes.empty() ? std::vector<std::string>{"70b"} : filter.shapes;
  absl::Status status = CheckNames("shapes", shapes, OpModels(), [](const OpModel& model) { return model.name; });
  status.Update(CheckNames("ops", filter.ops, OpKinds(), [](const OpKind& kind) { return std::string(kind.op); }));
  if (!status.ok()) return status;
  std::vector<OpSpec> specs;
  for (const OpKind& kind : OpKinds()) {
    if (!filter.ops.empty() && std::find(filter.ops.begin(), filter.ops.end(), kind.op) == filter.ops.end()) continue;
    for (const OpModel& model : OpModels()) {
      if (std::find(shapes.begin(), shapes.end(), model.name) == shapes.end()) continue;
      for (const char* variant : kind.variants) {
        for (int64_t rows : filter.rows.empty() ? kind.rows : filter.rows) {
          const int64_t context = ContextOf(variant);
          if (kind.op == std::string("attention") && context == 0 && rows == 1) continue;  // one length does not differ
          if (kind.op == std::string("prefill") && rows > context) continue;
          specs.push_back({kind.op, model, variant, rows, context});
        }
      }
    }
  }
  return specs;
}

}  // namespace nibble
