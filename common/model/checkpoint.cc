#include "common/model/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

constexpr int64_t kBlockChannels = 128;

absl::Status Bad(const std::string& dir, const std::string& tensor, const std::string& reason) {
  return absl::InvalidArgumentError(absl::StrCat(dir, ": tensor ", Quoted(tensor), " ", reason));
}

// Little-endian values of a tensor, which may lie unaligned in the file.
template <typename T>
T Load(const TensorView& view, int64_t index) {
  T value;
  std::memcpy(&value, view.data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}
static_assert(std::endian::native == std::endian::little, "safetensors are little-endian, read in place");

// The part [first, first + count) of each of the rows [row, row + rows) of a [*, columns] tensor of T.
template <typename T>
void CopyBlock(const TensorView& view, int64_t columns, int64_t row, int64_t rows, int64_t first, int64_t count,
               T* out) {
  const int64_t size = sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * count, view.data + ((row + r) * columns + first) * size, static_cast<size_t>(count * size));
  }
}

bool IsDenseType(TensorType type) {
  return type == TensorType::kBF16 || type == TensorType::kF16 || type == TensorType::kF32;
}

float LoadDense(const TensorView& view, int64_t index) {
  switch (view.type) {
    case TensorType::kBF16:
      return ToFloat(Load<BF16>(view, index));
    case TensorType::kF16:
      return ToFloat(Load<F16>(view, index));
    default:
      return Load<float>(view, index);
  }
}

// A block of a dense tensor as bf16. False when a value is not finite, or not once rounded to bf16.
bool CopyDense(const TensorView& view, int64_t columns, int64_t row, int64_t rows, int64_t first, int64_t count,
               BF16* out) {
  if (view.type == TensorType::kBF16) {
    CopyBlock<BF16>(view, columns, row, rows, first, count, out);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < count; ++c) {
        out[r * count + c] = ToBF16(LoadDense(view, (row + r) * columns + first + c));
      }
    }
  }
  return std::none_of(out, out + rows * count, [](BF16 x) { return (x.bits & 0x7f80u) == 0x7f80u; });
}

absl::StatusOr<TensorView> GetDense(const std::string& dir, const SafeTensors& tensors, const std::string& name,
                                    std::span<const int64_t> shape) {
  NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors.Get(name));
  if (!IsDenseType(view.type)) {
    return Bad(dir, name, absl::StrCat("is ", TensorTypeName(view.type), ", must be BF16, F16 or F32"));
  }
  return tensors.Get(name, view.type, shape);
}

bool IsPermutation(std::span<const int32_t> perm) {
  std::vector<bool> seen(perm.size(), false);
  for (const int32_t channel : perm) {
    if (channel < 0 || channel >= static_cast<int64_t>(perm.size()) || seen[static_cast<size_t>(channel)]) return false;
    seen[static_cast<size_t>(channel)] = true;
  }
  return true;
}

// The file tensor behind a linear's weight.
std::string WeightName(const ModelConfig& config, const LinearShape& shape) {
  if (shape.name == "lm_head" && config.tie_word_embeddings) return "model.embed_tokens.weight";
  return shape.name + ".weight";
}

}  // namespace

std::vector<LinearShape> DecoderLinears(const ModelConfig& config) {
  const int64_t h = config.hidden_size, f = config.intermediate_size;
  const int64_t q = config.num_heads * config.head_dim, kv = config.num_kv_heads * config.head_dim;
  std::vector<LinearShape> linears;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const std::string qkv = prefix + "self_attn.qkv", gate_up = prefix + "mlp.gate_up";
    linears.push_back({prefix + "self_attn.q_proj", q, h, config.qkv_bias, ShardAxis::kColumns, qkv});
    linears.push_back({prefix + "self_attn.k_proj", kv, h, config.qkv_bias, ShardAxis::kColumns, qkv});
    linears.push_back({prefix + "self_attn.v_proj", kv, h, config.qkv_bias, ShardAxis::kColumns, qkv});
    linears.push_back(
        {prefix + "self_attn.o_proj", h, q, config.o_bias, ShardAxis::kRows, prefix + "self_attn.o_proj"});
    linears.push_back({prefix + "mlp.gate_proj", f, h, false, ShardAxis::kColumns, gate_up});
    linears.push_back({prefix + "mlp.up_proj", f, h, false, ShardAxis::kColumns, gate_up});
    linears.push_back({prefix + "mlp.down_proj", h, f, false, ShardAxis::kRows, prefix + "mlp.down_proj"});
  }
  return linears;
}

LinearShape HeadLinear(const ModelConfig& config) {
  return {"lm_head", config.vocab_size, config.hidden_size, false, ShardAxis::kColumns, "lm_head"};
}

std::vector<std::pair<std::string, std::vector<int64_t>>> DenseTensors(const ModelConfig& config) {
  const int64_t h = config.hidden_size;
  std::vector<std::pair<std::string, std::vector<int64_t>>> tensors;
  tensors.push_back({"model.embed_tokens.weight", {config.vocab_size, h}});
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    tensors.push_back({prefix + "input_layernorm.weight", {h}});
    tensors.push_back({prefix + "post_attention_layernorm.weight", {h}});
  }
  tensors.push_back({"model.norm.weight", {h}});
  return tensors;
}

int64_t RowSegments(const ModelConfig& config) {
  int64_t segments = 1;
  for (int64_t world = 2; world <= 8; ++world) {
    const int64_t step = world * kBlockChannels;
    if (config.num_kv_heads % world == 0 && (config.num_heads * config.head_dim) % step == 0 &&
        config.intermediate_size % step == 0) {
      segments = std::lcm(segments, world);
    }
  }
  return segments;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& dir) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->dir_ = dir;
  NIBBLE_ASSIGN_OR_RETURN(checkpoint->config_, LoadModelConfig(dir));
  NIBBLE_ASSIGN_OR_RETURN(checkpoint->tensors_, SafeTensors::Open(dir));
  NIBBLE_RETURN_IF_ERROR(checkpoint->Validate());
  return checkpoint;
}

absl::Status Checkpoint::Validate() const {
  std::set<std::string> expected;
  const auto expect_dense = [&](const std::string& name, std::span<const int64_t> shape) {
    expected.insert(name);
    return GetDense(dir_, *tensors_, name, shape).status();
  };
  for (const auto& [name, shape] : DenseTensors(config_)) NIBBLE_RETURN_IF_ERROR(expect_dense(name, shape));

  std::vector<LinearShape> linears = DecoderLinears(config_);
  linears.push_back(HeadLinear(config_));
  for (const LinearShape& linear : linears) {
    if (config_.quantization == Quantization::kBF16 || linear.name == "lm_head") {
      const int64_t shape[] = {linear.n, linear.k};
      NIBBLE_RETURN_IF_ERROR(expect_dense(WeightName(config_, linear), shape));
    } else {
      NIBBLE_RETURN_IF_ERROR(ValidateQuantized(linear));
      for (const char* part :
           {".qweight", ".group_scale", ".group_min", ".channel_scale", ".block_bits", ".input_perm"}) {
        expected.insert(linear.name + part);
      }
    }
    if (linear.bias) {
      const int64_t shape[] = {linear.n};
      NIBBLE_RETURN_IF_ERROR(expect_dense(linear.name + ".bias", shape));
    }
  }

  // A tensor nothing asks for is a model this code would run wrongly (a bias, an adapter, an expert). Two exceptions:
  // old Llama exports carry RoPE frequencies, and some tied models a second copy of the embedding.
  for (const auto& [name, view] : tensors_->tensors()) {
    if (expected.contains(name) || absl::EndsWith(name, ".rotary_emb.inv_freq")) continue;
    if (name == "lm_head.weight" && config_.tie_word_embeddings) continue;
    return Bad(dir_, name, "is not part of the model that config.json describes");
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::ValidateQuantized(const LinearShape& shape) const {
  const int64_t n = shape.n, k = shape.k, blocks = k / kBlockChannels;
  const struct {
    const char* part;
    TensorType type;
    std::vector<int64_t> shape;
  } parts[] = {
      {".qweight", TensorType::kU8, {n, k / 2}},    {".group_scale", TensorType::kU8, {n, blocks}},
      {".group_min", TensorType::kI8, {n, blocks}}, {".channel_scale", TensorType::kF32, {n}},
      {".block_bits", TensorType::kU8, {blocks}},
  };
  for (const auto& part : parts) {
    NIBBLE_RETURN_IF_ERROR(tensors_->Get(shape.name + part.part, part.type, part.shape).status());
  }

  NIBBLE_ASSIGN_OR_RETURN(const TensorView bits, tensors_->Get(shape.name + ".block_bits"));
  for (int64_t b = 0; b < blocks; ++b) {
    const int value = bits.data[b];
    if (value == 8 || (value == 4 && config_.quantization == Quantization::kW4A4KV4)) continue;
    return Bad(dir_, shape.name + ".block_bits",
               absl::StrCat("has ", value, " at block ", b, ", must be ",
                            config_.quantization == Quantization::kW4A4KV4 ? "4 or 8" : "8"));
  }
  NIBBLE_ASSIGN_OR_RETURN(const TensorView scales, tensors_->Get(shape.name + ".channel_scale"));
  for (int64_t i = 0; i < n; ++i) {
    const float scale = Load<float>(scales, i);
    if (!std::isfinite(scale) || scale < 0) {
      return Bad(dir_, shape.name + ".channel_scale",
                 absl::StrCat("has ", scale, " at row ", i, ", must be finite and not negative"));
    }
  }
  const std::string perm_name = shape.name + ".input_perm";
  if (tensors_->Has(perm_name)) {
    const int64_t perm_shape[] = {k};
    NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors_->Get(perm_name, TensorType::kI32, perm_shape));
    std::vector<int32_t> perm(static_cast<size_t>(k));
    CopyBlock<int32_t>(view, k, 0, 1, 0, k, perm.data());
    if (!IsPermutation(perm)) return Bad(dir_, perm_name, absl::StrCat("is not a permutation of 0..", k - 1));
  }

  // q, k and v read one coded input, gate and up another: their tables must be the same bytes.
  const std::vector<LinearShape>& linears = DecoderLinears(config_);
  const auto first =
      std::find_if(linears.begin(), linears.end(), [&](const LinearShape& l) { return l.input == shape.input; });
  if (first->name == shape.name) return absl::OkStatus();
  for (const char* part : {".block_bits", ".input_perm"}) {
    const std::string mine = shape.name + part, theirs = first->name + part;
    bool same = tensors_->Has(mine) == tensors_->Has(theirs);
    if (same && tensors_->Has(mine)) {
      NIBBLE_ASSIGN_OR_RETURN(const TensorView a, tensors_->Get(mine));
      NIBBLE_ASSIGN_OR_RETURN(const TensorView b, tensors_->Get(theirs));
      same = a.bytes == b.bytes && std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes)) == 0;
    }
    if (!same) return Bad(dir_, mine, absl::StrCat("differs from ", Quoted(theirs), "; both read the same input"));
  }
  return absl::OkStatus();
}

std::string Checkpoint::Fingerprint() const {
  // FNV-1a, 64 bits: distinguishes checkpoints put side by side by mistake, not ones forged. Names, types and shapes
  // in sorted order, and the first bytes of every tensor, so that two calibrations of one model differ.
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
  };
  const auto mix_text = [&mix](const std::string& text) { mix(text.c_str(), text.size() + 1); };
  const ModelConfig& c = config_;
  std::string text = absl::StrCat(c.num_layers, ",", c.hidden_size, ",", c.intermediate_size, ",", c.num_heads, ",",
                                  c.num_kv_heads, ",", c.head_dim, ",", c.vocab_size, ",", c.max_position_embeddings);
  absl::StrAppend(&text, ",", c.rms_norm_eps, ",", c.rope_theta, ",", c.tie_word_embeddings, ",", c.qkv_bias, ",",
                  c.o_bias, ",", QuantizationName(c.quantization), ",", c.down_hadamard);
  if (c.rope_scaling) {
    absl::StrAppend(&text, ",", c.rope_scaling->factor, ",", c.rope_scaling->low_freq_factor, ",",
                    c.rope_scaling->high_freq_factor, ",", c.rope_scaling->original_max_position);
  }
  mix_text(text);
  constexpr int64_t kSampleBytes = 1024;
  for (const auto& [name, view] : tensors_->tensors()) {
    mix_text(name);
    mix_text(TensorTypeName(view.type));
    mix(view.shape.data(), view.shape.size() * sizeof(int64_t));
    mix(view.data, static_cast<size_t>(std::min(view.bytes, kSampleBytes)));
  }
  return absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
}

absl::StatusOr<std::vector<BF16>> Checkpoint::Dense(const std::string& name, std::span<const int64_t> shape) const {
  NIBBLE_ASSIGN_OR_RETURN(const TensorView view, GetDense(dir_, *tensors_, name, shape));
  const int64_t count = view.bytes / SizeOf(view.type);
  std::vector<BF16> values(static_cast<size_t>(count));
  if (!CopyDense(view, count, 0, 1, 0, count, values.data()))
    return Bad(dir_, name, "has a value that is not finite in bf16");
  return values;
}

namespace {

// The rows and columns of the whole [N, K] a rank holds.
struct Part {
  int64_t row = 0, rows = 0;  // rows that exist in the file
  int64_t padded_rows = 0;    // rows of the shard: more than `rows` only for lm_head
  int64_t column = 0, columns = 0;
};

absl::StatusOr<Part> Cut(const ModelConfig& config, const LinearShape& shape, ShardAxis axis, int rank, int world) {
  if (world < 1 || rank < 0 || rank >= world) {
    return absl::InvalidArgumentError(absl::StrCat("tensor-parallel rank ", rank, " of ", world, " does not exist"));
  }
  Part part{.row = 0, .rows = shape.n, .padded_rows = shape.n, .column = 0, .columns = shape.k};
  if (axis == ShardAxis::kNone || world == 1) return part;
  const auto indivisible = [&](const char* what, int64_t count) {
    return absl::InvalidArgumentError(
        absl::StrCat(shape.name, ": tensor-parallel size ", world, " does not divide the ", count, " ", what));
  };
  if (axis == ShardAxis::kRows) {
    if (shape.k % world != 0) return indivisible("input channels", shape.k);
    part.columns = shape.k / world;
    part.column = part.columns * rank;
    return part;
  }
  if (shape.name == "lm_head") {
    part.padded_rows = (shape.n + world - 1) / world;
    part.row = std::min(part.padded_rows * rank, shape.n);
    part.rows = std::min(part.padded_rows, shape.n - part.row);
    return part;
  }
  if (absl::StrContains(shape.name, ".self_attn.") && config.num_kv_heads % world != 0) {
    return indivisible("KV heads", config.num_kv_heads);
  }
  if (shape.n % world != 0) return indivisible("output channels", shape.n);
  part.rows = part.padded_rows = shape.n / world;
  part.row = part.rows * rank;
  return part;
}

}  // namespace

absl::StatusOr<LinearTensors> Checkpoint::Linear(const std::string& name, ShardAxis axis, int rank, int world) const {
  LinearShape shape = HeadLinear(config_);
  if (name != shape.name) {
    const std::vector<LinearShape> linears = DecoderLinears(config_);
    const auto it = std::find_if(linears.begin(), linears.end(), [&](const LinearShape& l) { return l.name == name; });
    if (it == linears.end()) return absl::NotFoundError(absl::StrCat(dir_, ": the model has no linear ", Quoted(name)));
    shape = *it;
  }
  NIBBLE_ASSIGN_OR_RETURN(const Part part, Cut(config_, shape, axis, rank, world));

  LinearTensors linear;
  linear.name = name;
  linear.n = part.padded_rows;
  linear.k = part.columns;
  linear.quantized = config_.quantization != Quantization::kBF16 && name != "lm_head";

  if (shape.bias && (axis != ShardAxis::kRows || rank == 0)) {
    const int64_t bias_shape[] = {shape.n};
    NIBBLE_ASSIGN_OR_RETURN(const TensorView view, GetDense(dir_, *tensors_, name + ".bias", bias_shape));
    for (int64_t i = 0; i < part.rows; ++i) linear.bias.push_back(LoadDense(view, part.row + i));
    if (!std::all_of(linear.bias.begin(), linear.bias.end(), [](float b) { return std::isfinite(b); })) {
      return Bad(dir_, name + ".bias", "has a value that is not finite");
    }
  }

  if (!linear.quantized) {
    const std::string weight = WeightName(config_, shape);
    const int64_t weight_shape[] = {shape.n, shape.k};
    NIBBLE_ASSIGN_OR_RETURN(const TensorView view, GetDense(dir_, *tensors_, weight, weight_shape));
    linear.dense.resize(static_cast<size_t>(linear.n * linear.k));  // zero, and so are padding rows
    if (!CopyDense(view, shape.k, part.row, part.rows, part.column, part.columns, linear.dense.data())) {
      return Bad(dir_, weight, "has a value that is not finite in bf16");
    }
    return linear;
  }

  if (part.columns % kBlockChannels != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": tensor-parallel size ", world, " leaves a rank ",
                                                   part.columns, " of ", shape.k,
                                                   " input channels, must be a multiple of ", kBlockChannels));
  }
  const int64_t blocks = shape.k / kBlockChannels;
  const int64_t block = part.column / kBlockChannels, block_count = part.columns / kBlockChannels;
  const auto copy = [&]<typename T>(const char* suffix, int64_t columns, int64_t first, int64_t count, int64_t row,
                                    int64_t rows, std::vector<T>* out) -> absl::Status {
    NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors_->Get(name + suffix));
    out->resize(static_cast<size_t>(rows * count));
    CopyBlock<T>(view, columns, row, rows, first, count, out->data());
    return absl::OkStatus();
  };
  NIBBLE_RETURN_IF_ERROR(
      copy(".qweight", shape.k / 2, part.column / 2, part.columns / 2, part.row, part.rows, &linear.qweight));
  NIBBLE_RETURN_IF_ERROR(copy(".group_scale", blocks, block, block_count, part.row, part.rows, &linear.group_scale));
  NIBBLE_RETURN_IF_ERROR(copy(".group_min", blocks, block, block_count, part.row, part.rows, &linear.group_min));
  NIBBLE_RETURN_IF_ERROR(copy(".channel_scale", shape.n, part.row, part.rows, 0, 1, &linear.channel_scale));
  NIBBLE_RETURN_IF_ERROR(copy(".block_bits", blocks, block, block_count, 0, 1, &linear.block_bits));

  // What makes the arithmetic of docs/numerics.md overflow-free: q4·s2 + m stays in int8 for every code.
  for (size_t i = 0; i < linear.group_scale.size(); ++i) {
    const int scale = linear.group_scale[i], min = linear.group_min[i];
    if (scale < 1 || scale > 16 || min < -119 || min > 119 || min + 15 * scale > 127) {
      return Bad(dir_, name + ".group_scale",
                 absl::StrCat("and group_min have ", scale, " and ", min, " at row ",
                              part.row + static_cast<int64_t>(i) / block_count, ", group ",
                              block + static_cast<int64_t>(i) % block_count,
                              ", must be 1..16 and -119..119 with min + 15 scale at most 127"));
    }
  }

  if (tensors_->Has(name + ".input_perm")) {
    NIBBLE_RETURN_IF_ERROR(copy(".input_perm", shape.k, part.column, part.columns, 0, 1, &linear.input_perm));
    for (int32_t& channel : linear.input_perm) {
      channel -= static_cast<int32_t>(part.column);
      if (channel < 0 || channel >= part.columns) {
        return Bad(dir_, name + ".input_perm",
                   absl::StrCat("moves channels between the ranks of tensor-parallel size ", world,
                                "; this checkpoint was not quantized for that size"));
      }
    }
  }
  return linear;
}

}  // namespace nibble
