#include "tools/quantize/quantizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/thread_pool.h"
#include "common/base/version.h"
#include "common/model/checkpoint.h"
#include "common/model/json_file.h"
#include "common/model/writer.h"
#include "kernels/ops.h"
#include "tools/quantize/dense_layer.h"
#include "tools/quantize/input_plan.h"
#include "tools/quantize/weight_quantizer.h"

namespace nibble {
namespace {

// What makes a model directory usable besides config and tensors. Copied when present.
constexpr const char* kCopiedFiles[] = {"tokenizer.json",         "tokenizer_config.json", "special_tokens_map.json",
                                        "generation_config.json", "chat_template.jinja",   "added_tokens.json"};
constexpr int64_t kMaxCopiedBytes = int64_t{256} << 20;

using LayerPlans = std::array<InputPlan, kLayerInputs>;

bool IsRowParallel(LayerInput which) { return which == LayerInput::kO || which == LayerInput::kDown; }

// One run of the tool.
class Quantizer {
 public:
  Quantizer(const QuantizeOptions& options, const Checkpoint& source, QuantizeListener* listener)
      : options_(options),
        source_(source),
        config_(source.config()),
        listener_(*listener),
        pool_(std::max(1, options.calibration_options.threads)) {}

  absl::StatusOr<QuantizeReport> Run() {
    NIBBLE_RETURN_IF_ERROR(CheckSource());
    const std::vector<TensorSpec> specs = OutputTensors();
    tensors_ = static_cast<int64_t>(specs.size());
    NIBBLE_ASSIGN_OR_RETURN(
        writer_,
        ModelWriter::Create(options_.output, specs,
                            {.overwrite = options_.overwrite,
                             .max_shard_bytes = options_.max_shard_bytes,
                             .metadata = {{"format", "pt"}, {"quantizer", absl::StrCat("nibble ", kVersion)}}}));
    report_.output_bytes = writer_->total_bytes();
    for (const auto& [name, view] : source_.tensors().tensors()) report_.source_bytes += view.bytes;

    if (Quantizes()) {
      NIBBLE_RETURN_IF_ERROR(GatherStatistics());
      NIBBLE_RETURN_IF_ERROR(PlanInputs());
    }
    NIBBLE_RETURN_IF_ERROR(WriteDense());
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) NIBBLE_RETURN_IF_ERROR(WriteLayer(layer));
    NIBBLE_RETURN_IF_ERROR(WriteFiles());
    NIBBLE_RETURN_IF_ERROR(writer_->Commit());
    return std::move(report_);
  }

 private:
  bool Quantizes() const { return options_.mode != Quantization::kBF16; }
  bool HasPermutations() const { return options_.mode == Quantization::kW4A4KV4; }

  absl::Status CheckSource() const {
    if (config_.quantization != Quantization::kBF16) {
      return absl::InvalidArgumentError(absl::StrCat(options_.model, ": is quantized already (",
                                                     QuantizationName(config_.quantization),
                                                     "); give the unquantized model"));
    }
    std::error_code ignored;
    if (std::filesystem::equivalent(options_.model, options_.output, ignored)) {
      return absl::InvalidArgumentError(
          absl::StrCat(options_.output, ": is the model itself, must be another directory"));
    }
    if (!Quantizes()) return absl::OkStatus();
    if (!(options_.settings.eight_bit_share >= 0 && options_.settings.eight_bit_share <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("eight-bit share is ", options_.settings.eight_bit_share, ", must be from 0 to 1"));
    }
    for (const LinearShape& shape : DecoderLinears(config_)) {
      if (shape.k % kBlock != 0) {
        return absl::InvalidArgumentError(absl::StrCat(options_.model, ": ", shape.name, " has ", shape.k,
                                                       " input channels, must be a multiple of ", kBlock,
                                                       " to be quantized"));
      }
    }
    return absl::OkStatus();
  }

  std::vector<TensorSpec> OutputTensors() const {
    std::vector<TensorSpec> specs;
    for (const auto& [name, shape] : DenseTensors(config_)) specs.push_back({name, TensorType::kBF16, shape});
    if (!config_.tie_word_embeddings)
      specs.push_back({"lm_head.weight", TensorType::kBF16, {config_.vocab_size, config_.hidden_size}});
    for (const LinearShape& l : DecoderLinears(config_)) {
      if (Quantizes()) {
        specs.push_back({l.name + ".qweight", TensorType::kU8, {l.n, l.k / 2}});
        specs.push_back({l.name + ".group_scale", TensorType::kU8, {l.n, l.k / kBlock}});
        specs.push_back({l.name + ".group_min", TensorType::kI8, {l.n, l.k / kBlock}});
        specs.push_back({l.name + ".channel_scale", TensorType::kF32, {l.n}});
        specs.push_back({l.name + ".block_bits", TensorType::kU8, {l.k / kBlock}});
        if (HasPermutations()) specs.push_back({l.name + ".input_perm", TensorType::kI32, {l.k}});
      } else {
        specs.push_back({l.name + ".weight", TensorType::kBF16, {l.n, l.k}});
      }
      if (l.bias) specs.push_back({l.name + ".bias", TensorType::kF32, {l.n}});
    }
    return specs;
  }

  absl::Status GatherStatistics() {
    CalibrationOptions calibration = options_.calibration_options;
    calibration.window_tokens = std::min(calibration.window_tokens, config_.max_position_embeddings);
    NIBBLE_ASSIGN_OR_RETURN(const auto windows,
                            CalibrationWindows(options_.model, options_.calibration, config_.vocab_size, calibration));
    const int64_t count = static_cast<int64_t>(windows.size());
    NIBBLE_ASSIGN_OR_RETURN(statistics_, Calibrate(source_, windows, calibration,
                                                   [&](int64_t done) { return listener_.Calibrated(done, count); }));
    return absl::OkStatus();
  }

  absl::StatusOr<DenseLayer> TransformedLayer(int64_t layer, LayerStatistics* statistics) const {
    NIBBLE_ASSIGN_OR_RETURN(DenseLayer dense, LoadDenseLayer(source_, layer));
    for (const auto& transform : transforms_) transform->Apply(config_, statistics, &dense);
    return dense;
  }

  int64_t Segments(LayerInput which) const { return IsRowParallel(which) ? RowSegments(config_) : 1; }

  // Every input's permutation and 8-bit blocks. Two passes over the layers (here and when writing) keep one layer in
  // memory at a time.
  absl::Status PlanInputs() {
    plans_.resize(static_cast<size_t>(config_.num_layers));
    if (options_.mode == Quantization::kW4A8KV4) {
      for (size_t i = 0; i < plans_.size(); ++i) {
        for (size_t j = 0; j < kLayerInputs; ++j) plans_[i][j] = EightBitPlan(statistics_[i].inputs[j].k);
      }
      CountBlocks();
      return absl::OkStatus();
    }

    NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<Ops> ops, CreateOps({.backend = "cpu", .threads = pool_.threads()}));
    struct Input {
      std::vector<float> column_energy, importance;
      int64_t segments;
    };
    std::vector<Input> inputs;
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      LayerStatistics statistics = statistics_[static_cast<size_t>(layer)];
      NIBBLE_ASSIGN_OR_RETURN(const DenseLayer dense, TransformedLayer(layer, &statistics));
      for (size_t j = 0; j < kLayerInputs; ++j) {
        const LayerInput which = static_cast<LayerInput>(j);
        Input input{.column_energy = ColumnEnergy(dense, which), .importance = {}, .segments = Segments(which)};
        for (size_t c = 0; c < input.column_energy.size(); ++c) {
          input.importance.push_back(std::sqrt(statistics.input(which).mean_square[c] * input.column_energy[c]));
        }
        inputs.push_back(std::move(input));
      }
    }

    std::vector<BlockBidder> bidders;
    int64_t all_blocks = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const LayerStatistics& statistics = statistics_[i / kLayerInputs];
      const LayerInput which = static_cast<LayerInput>(i % kLayerInputs);
      const Input& input = inputs[i];
      const int64_t blocks = static_cast<int64_t>(input.importance.size()) / kBlock;
      const bool attention = which == LayerInput::kQkv || which == LayerInput::kO;
      bidders.push_back({.name = absl::StrCat("layer ", i / kLayerInputs, " input ", i % kLayerInputs),
                         .at_least = IsRowParallel(which) ? 0 : 1,
                         .at_most = std::max<int64_t>(1, blocks / 2),
                         .worth = attention ? statistics.attention_share : statistics.mlp_share,
                         .error = [&ops, &input, &statistics, which](int64_t eight_bit_blocks) {
                           return CodingError(ops.get(), statistics.input(which).samples, input.column_energy,
                                              PlanInput(input.importance, input.segments, eight_bit_blocks));
                         }});
      all_blocks += blocks;
    }
    const int64_t budget = static_cast<int64_t>(std::floor(options_.settings.eight_bit_share * static_cast<double>(all_blocks)));
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<int64_t> eight_bit, AllocateEightBitBlocks(bidders, budget));
    for (size_t i = 0; i < inputs.size(); ++i) {
      plans_[i / kLayerInputs][i % kLayerInputs] = PlanInput(inputs[i].importance, inputs[i].segments, eight_bit[i]);
    }
    CountBlocks();
    return absl::OkStatus();
  }

  void CountBlocks() {
    for (const LayerPlans& layer : plans_) {
      for (const InputPlan& plan : layer) {
        const int64_t eight = std::count(plan.block_bits.begin(), plan.block_bits.end(), 8);
        report_.blocks += static_cast<int64_t>(plan.block_bits.size());
        report_.eight_bit_blocks += eight;
        report_.eight_bit_per_input.push_back(eight);
      }
    }
  }

  template <typename T>
  absl::Status Write(const std::string& name, const std::vector<T>& values) {
    NIBBLE_RETURN_IF_ERROR(writer_->Write(name, values));
    return listener_.Quantized(++written_, tensors_, name);
  }

  absl::Status WriteDense() {
    for (const auto& [name, shape] : DenseTensors(config_)) {
      NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> values, source_.Dense(name, shape));
      NIBBLE_RETURN_IF_ERROR(Write(name, values));
    }
    if (config_.tie_word_embeddings) return absl::OkStatus();
    NIBBLE_ASSIGN_OR_RETURN(const LinearTensors head, source_.Linear("lm_head", ShardAxis::kNone, 0, 1));
    return Write("lm_head.weight", head.dense);
  }

  absl::Status WriteLayer(int64_t layer) {
    if (!Quantizes()) {
      for (const LinearShape& shape : DecoderLinears(config_)) {
        if (!shape.name.starts_with(absl::StrCat("model.layers.", layer, "."))) continue;
        NIBBLE_ASSIGN_OR_RETURN(const LinearTensors tensors, source_.Linear(shape.name, ShardAxis::kNone, 0, 1));
        NIBBLE_RETURN_IF_ERROR(Write(shape.name + ".weight", tensors.dense));
        if (shape.bias) NIBBLE_RETURN_IF_ERROR(Write(shape.name + ".bias", tensors.bias));
      }
      return absl::OkStatus();
    }
    LayerStatistics statistics = statistics_[static_cast<size_t>(layer)];
    NIBBLE_ASSIGN_OR_RETURN(const DenseLayer dense, TransformedLayer(layer, &statistics));
    for (size_t i = 0; i < kLayerLinears; ++i) {
      const DenseLinear& linear = dense.linears[i];
      const size_t input = static_cast<size_t>(InputOf(static_cast<LayerLinear>(i)));
      const LinearTensors tensors = QuantizeLinear(linear, plans_[static_cast<size_t>(layer)][input],
                                                   statistics.inputs[input].mean_square, &pool_);
      NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".qweight", tensors.qweight));
      NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".group_scale", tensors.group_scale));
      NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".group_min", tensors.group_min));
      NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".channel_scale", tensors.channel_scale));
      NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".block_bits", tensors.block_bits));
      if (HasPermutations()) NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".input_perm", tensors.input_perm));
      if (linear.shape.bias) NIBBLE_RETURN_IF_ERROR(Write(tensors.name + ".bias", tensors.bias));
    }
    return absl::OkStatus();
  }

  absl::Status WriteFiles() {
    NIBBLE_ASSIGN_OR_RETURN(nlohmann::json json, ReadJsonObject(options_.model + "/config.json"));
    json.erase("quantization_config");
    if (Quantizes()) {
      std::vector<std::string> transforms;
      for (const auto& transform : transforms_) transforms.emplace_back(transform->name());
      if (HasPermutations()) transforms.emplace_back("channel_permutation");
      transforms.emplace_back("weight_clip_search");
      json["quantization_config"] = {{"quant_method", "nibble"},
                                     {"version", kQuantizedFormatVersion},
                                     {"mode", QuantizationName(options_.mode)},
                                     {"group_size", kBlock},
                                     {"blocks", report_.blocks},
                                     {"eight_bit_blocks", report_.eight_bit_blocks},
                                     {"row_segments", RowSegments(config_)},
                                     {"down_hadamard", 0},
                                     {"transforms", transforms},
                                     {"quantizer", absl::StrCat("nibble ", kVersion)}};
    }
    NIBBLE_RETURN_IF_ERROR(writer_->WriteFile("config.json", json.dump(2) + "\n"));
    for (const char* name : kCopiedFiles) {
      const absl::StatusOr<std::string> contents = ReadSmallFile(options_.model + "/" + name, kMaxCopiedBytes);
      if (absl::IsNotFound(contents.status())) continue;
      NIBBLE_RETURN_IF_ERROR(contents.status());
      NIBBLE_RETURN_IF_ERROR(writer_->WriteFile(name, *contents));
    }
    return absl::OkStatus();
  }

  const QuantizeOptions& options_;
  const Checkpoint& source_;
  const ModelConfig& config_;
  QuantizeListener& listener_;
  ThreadPool pool_;
  const std::vector<std::unique_ptr<Transform>> transforms_ = DefaultTransforms();

  std::unique_ptr<ModelWriter> writer_;
  std::vector<LayerStatistics> statistics_;
  std::vector<LayerPlans> plans_;
  QuantizeReport report_;
  int64_t tensors_ = 0;
  int64_t written_ = 0;
};

}  // namespace

absl::StatusOr<QuantizeReport> QuantizeModel(const QuantizeOptions& options, QuantizeListener* listener) {
  NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> source, Checkpoint::Open(options.model));
  return Quantizer(options, *source, listener).Run();
}

}  // namespace nibble
