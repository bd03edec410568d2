#include "worker/model/weights.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/rope_table.h"

namespace nibble {
namespace {

absl::Status CheckSharding(const ModelConfig& config, int rank, int world_size) {
  if (world_size < 1 || world_size > kMaxRanks) {
    return absl::InvalidArgumentError(absl::StrCat("world_size is ", world_size, ", must be in 1..", kMaxRanks));
  }
  if (rank < 0 || rank >= world_size) {
    return absl::InvalidArgumentError(absl::StrCat("rank is ", rank, ", must be in 0..", world_size - 1));
  }
  if (config.num_kv_heads % world_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("world_size ", world_size, " does not divide the model's ", config.num_kv_heads, " KV heads"));
  }
  if (config.intermediate_size % world_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("world_size ", world_size, " does not divide intermediate_size ", config.intermediate_size));
  }
  return absl::OkStatus();
}

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, Model* model) : checkpoint_(checkpoint), model_(*model) {}

  absl::Status Load() {
    const ModelConfig& config = model_.config;
    const int64_t h = config.hidden_size;
    NIBBLE_ASSIGN_OR_RETURN(model_.embedding, Dense("model.embed_tokens.weight", {config.vocab_size, h}));
    NIBBLE_ASSIGN_OR_RETURN(model_.rope, Upload(RopeTable(config)));
    for (int64_t i = 0; i < config.num_layers; ++i) {
      NIBBLE_ASSIGN_OR_RETURN(LayerWeights layer, LoadLayer(absl::StrCat("model.layers.", i)));
      model_.layers.push_back(std::move(layer));
    }
    NIBBLE_ASSIGN_OR_RETURN(model_.final_norm, Dense("model.norm.weight", {h}));
    const ShardAxis axis = model_.head_columns < config.vocab_size ? ShardAxis::kColumns : ShardAxis::kNone;
    return Fuse({"lm_head"}, axis, /*hadamard=*/0, &model_.head_input, &model_.head);
  }

 private:
  absl::StatusOr<LayerWeights> LoadLayer(const std::string& prefix) {
    const int64_t h = model_.config.hidden_size;
    const std::string attention = prefix + ".self_attn.", mlp = prefix + ".mlp.";
    LayerWeights layer;
    NIBBLE_ASSIGN_OR_RETURN(layer.input_norm, Dense(prefix + ".input_layernorm.weight", {h}));
    NIBBLE_ASSIGN_OR_RETURN(layer.post_attention_norm, Dense(prefix + ".post_attention_layernorm.weight", {h}));
    NIBBLE_RETURN_IF_ERROR(Fuse({attention + "q_proj", attention + "k_proj", attention + "v_proj"}, ShardAxis::kColumns,
                                /*hadamard=*/0, &layer.qkv_input, &layer.qkv));
    NIBBLE_RETURN_IF_ERROR(Fuse({attention + "o_proj"}, ShardAxis::kRows, /*hadamard=*/0, &layer.o_input, &layer.o));
    NIBBLE_RETURN_IF_ERROR(Fuse({mlp + "gate_proj", mlp + "up_proj"}, ShardAxis::kColumns, /*hadamard=*/0,
                                &layer.gate_up_input, &layer.gate_up));
    NIBBLE_RETURN_IF_ERROR(
        Fuse({mlp + "down_proj"}, ShardAxis::kRows, model_.config.down_hadamard, &layer.down_input, &layer.down));
    return layer;
  }

  // This rank's shard of the named projections, stacked along N, and the coding of the input they share.
  absl::Status Fuse(std::initializer_list<std::string> names, ShardAxis axis, int64_t hadamard, CodedInput* input,
                    FusedLinear* fused) {
    std::vector<LinearTensors> parts;
    for (const std::string& name : names) {
      NIBBLE_ASSIGN_OR_RETURN(LinearTensors part, checkpoint_.Linear(name, axis, model_.rank, model_.world_size));
      parts.push_back(std::move(part));
    }
    const LinearTensors& first = parts.front();
    for (const LinearTensors& part : parts) {
      if (part.k != first.k || part.quantized != first.quantized || part.block_bits != first.block_bits ||
          part.input_perm != first.input_perm) {
        return absl::InvalidArgumentError(
            absl::StrCat(part.name, " and ", first.name, " read the same input but code it differently"));
      }
    }
    NIBBLE_ASSIGN_OR_RETURN(fused->weight, Pack(parts));
    NIBBLE_ASSIGN_OR_RETURN(fused->bias, StackBiases(parts));

    input->coding = {.k = first.k, .quantized = first.quantized, .hadamard = hadamard};
    if (first.quantized) {
      NIBBLE_ASSIGN_OR_RETURN(input->block_bits, Upload(first.block_bits));
      input->coding.block_bits = input->block_bits.as<uint8_t>();
    }
    if (!first.input_perm.empty()) {
      NIBBLE_ASSIGN_OR_RETURN(input->perm, Upload(first.input_perm));
      input->coding.perm = input->perm.as<int32_t>();
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<Weight>> Pack(const std::vector<LinearTensors>& parts) {
    if (!parts.front().quantized) {
      std::vector<DenseView> views;
      for (const LinearTensors& part : parts) views.push_back({.n = part.n, .k = part.k, .data = part.dense.data()});
      return model_.ops->PackDense(views);
    }
    std::vector<W4View> views;
    for (const LinearTensors& part : parts) {
      views.push_back({.n = part.n,
                       .k = part.k,
                       .qweight = part.qweight.data(),
                       .group_scale = part.group_scale.data(),
                       .group_min = part.group_min.data(),
                       .channel_scale = part.channel_scale.data(),
                       .block_bits = part.block_bits.data()});
    }
    return model_.ops->PackW4(views);
  }

  // Row-parallel biases are rank 0's alone (Checkpoint::Linear gives them to nobody else), or the sum would have them
  // often.
  absl::StatusOr<Buffer> StackBiases(const std::vector<LinearTensors>& parts) {
    if (std::all_of(parts.begin(), parts.end(), [](const LinearTensors& part) { return part.bias.empty(); }))
      return Buffer();
    std::vector<float> bias;
    for (const LinearTensors& part : parts) {
      const size_t begin = bias.size();
      bias.insert(bias.end(), part.bias.begin(), part.bias.end());
      bias.resize(begin + static_cast<size_t>(part.n), 0.0f);
    }
    return Upload(bias);
  }

  absl::StatusOr<Buffer> Dense(const std::string& name, std::initializer_list<int64_t> shape) {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> values, checkpoint_.Dense(name, std::vector<int64_t>(shape)));
    return Upload(values);
  }

  template <typename T>
  absl::StatusOr<Buffer> Upload(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    NIBBLE_ASSIGN_OR_RETURN(Buffer buffer, model_.ops->Allocate(bytes));
    model_.ops->Upload(buffer.data(), values.data(), bytes);
    return buffer;
  }

  const Checkpoint& checkpoint_;
  Model& model_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const Checkpoint& checkpoint, std::shared_ptr<Ops> ops, int rank,
                                                       int world_size) {
  NIBBLE_CHECK(ops != nullptr);
  const ModelConfig& config = checkpoint.config();
  NIBBLE_RETURN_IF_ERROR(CheckSharding(config, rank, world_size));
  auto model = std::make_shared<Model>();
  model->config = config;
  model->ops = std::move(ops);
  model->rank = rank;
  model->world_size = world_size;
  model->q_heads = config.num_heads / world_size;
  model->kv_heads = config.num_kv_heads / world_size;
  model->intermediate_size = config.intermediate_size / world_size;
  model->head_columns = config.vocab_size % world_size == 0 ? config.vocab_size / world_size : config.vocab_size;
  const bool reference = config.quantization == Quantization::kBF16;
  model->activations = reference ? DType::kF32 : DType::kBF16;
  model->kv_format = reference ? KvFormat::kF32 : KvFormat::kKV4;
  NIBBLE_RETURN_IF_ERROR(Loader(checkpoint, model.get()).Load());
  NIBBLE_RETURN_IF_ERROR(model->ops->Synchronize());
  return model;
}

}  // namespace nibble
