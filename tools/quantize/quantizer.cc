#include "tools/quantize/quantizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/model/checkpoint.h"
#include "common/model/json_file.h"
#include "common/model/writer.h"
#include "kernels/ops.h"
#include "tools/quantize/layer_quantizer.h"
#include "tools/quantize/model_files.h"
#include "tools/quantize/rounding_record.h"
#include "tools/quantize/work_directory.h"

namespace nibble {
namespace {

template <typename T>
std::span<const uint8_t> Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(T)};
}

std::vector<BF16> Rounded(const std::vector<float>& values) {
  std::vector<BF16> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](float x) { return ToBF16(x); });
  return out;
}

std::string NormName(int64_t layer, const char* which) {
  return absl::StrCat("model.layers.", layer, ".", which, "_layernorm.weight");
}

// Of one quantized linear; data empty where only the shapes are wanted.
std::vector<WorkDirectory::Tensor> LinearParts(const LinearShape& l, const LinearTensors& t, bool permuted) {
  std::vector<WorkDirectory::Tensor> parts = {
      {{l.name + ".qweight", TensorType::kU8, {l.n, l.k / 2}}, Bytes(t.qweight)},
      {{l.name + ".group_scale", TensorType::kU8, {l.n, l.k / kBlock}}, Bytes(t.group_scale)},
      {{l.name + ".group_min", TensorType::kI8, {l.n, l.k / kBlock}}, Bytes(t.group_min)},
      {{l.name + ".channel_scale", TensorType::kF32, {l.n}}, Bytes(t.channel_scale)},
      {{l.name + ".block_bits", TensorType::kU8, {l.k / kBlock}}, Bytes(t.block_bits)}};
  if (permuted) parts.push_back({{l.name + ".input_perm", TensorType::kI32, {l.k}}, Bytes(t.input_perm)});
  if (l.bias) parts.push_back({{l.name + ".bias", TensorType::kF32, {l.n}}, Bytes(t.bias)});
  return parts;
}

uint64_t Hash(const std::vector<std::vector<uint32_t>>& windows) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const auto& window : windows) {
    for (const uint32_t token : window) hash = (hash ^ token) * 0x100000001b3u;
  }
  return hash;
}

// One run of the tool.
class Quantizer {
 public:
  Quantizer(const QuantizeOptions& options, const Checkpoint& source, QuantizeListener* listener)
      : options_(options), source_(source), config_(source.config()), listener_(*listener) {}

  absl::StatusOr<QuantizeReport> Run() {
    NIBBLE_RETURN_IF_ERROR(CheckSource());
    if (Quantizes()) NIBBLE_RETURN_IF_ERROR(CreateLayerQuantizer());
    const std::vector<TensorSpec> specs = OutputTensors();
    NIBBLE_ASSIGN_OR_RETURN(
        writer_,
        ModelWriter::Create(options_.output, specs,
                            {.overwrite = options_.overwrite,
                             .max_shard_bytes = options_.max_shard_bytes,
                             .metadata = {{"format", "pt"}, {"quantizer", absl::StrCat("nibble ", kVersion)}}}));
    report_.output_bytes = writer_->total_bytes();
    for (const auto& [name, view] : source_.tensors().tensors()) report_.source_bytes += view.bytes;
    NIBBLE_RETURN_IF_ERROR(Quantizes() ? WriteQuantized() : WriteCopy());
    return std::move(report_);
  }

 private:
  bool Quantizes() const { return options_.mode != Quantization::kBF16; }
  bool Permutes() const { return options_.settings.permute != ChannelOrder::kOff; }
  const ModelConfig& OutputConfig() const { return Quantizes() ? layers_->config() : config_; }

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
    return absl::OkStatus();
  }

  absl::Status CreateLayerQuantizer() {
    CalibrationOptions calibration = options_.calibration_options;
    calibration.window_tokens = std::min(calibration.window_tokens, config_.max_position_embeddings);
    NIBBLE_ASSIGN_OR_RETURN(auto windows,
                            CalibrationWindows(options_.model, options_.calibration, config_.vocab_size, calibration));
    run_ = {{"version", kVersion},
            {"model", source_.Fingerprint()},
            {"mode", QuantizationName(options_.mode)},
            {"device", options_.device},
            {"settings", SettingValues(options_.settings)},
            {"windows", windows.size()},
            {"calibration", absl::StrCat(absl::Hex(Hash(windows)))},
            {"sample_rows", calibration.sample_rows}};
    NIBBLE_ASSIGN_OR_RETURN(layers_, LayerQuantizer::Create(source_, std::move(windows),
                                                            {.mode = options_.mode,
                                                             .settings = options_.settings,
                                                             .device = options_.device,
                                                             .threads = std::max(1, options_.threads),
                                                             .sample_rows = calibration.sample_rows}));
    return absl::OkStatus();
  }

  std::vector<TensorSpec> OutputTensors() const {
    const ModelConfig& config = OutputConfig();
    std::vector<TensorSpec> specs;
    for (const auto& [name, shape] : DenseTensors(config)) specs.push_back({name, TensorType::kBF16, shape});
    if (!config.tie_word_embeddings)
      specs.push_back({"lm_head.weight", TensorType::kBF16, {config.vocab_size, config.hidden_size}});
    for (const LinearShape& l : DecoderLinears(config)) {
      if (Quantizes()) {
        for (const auto& part : LinearParts(l, {}, Permutes())) specs.push_back(part.spec);
      } else {
        specs.push_back({l.name + ".weight", TensorType::kBF16, {l.n, l.k}});
        if (l.bias) specs.push_back({l.name + ".bias", TensorType::kF32, {l.n}});
      }
    }
    return specs;
  }

  absl::Status WriteCopy() {
    for (const auto& [name, shape] : DenseTensors(config_)) {
      NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> values, source_.Dense(name, shape));
      NIBBLE_RETURN_IF_ERROR(writer_->Write(name, values));
    }
    std::vector<LinearShape> linears = DecoderLinears(config_);
    if (!config_.tie_word_embeddings) linears.push_back(HeadLinear(config_));
    for (size_t i = 0; i < linears.size(); ++i) {
      NIBBLE_RETURN_IF_ERROR(
          listener_.Advanced(static_cast<int64_t>(i), static_cast<int64_t>(linears.size()), linears[i].name));
      NIBBLE_ASSIGN_OR_RETURN(const LinearTensors tensors, source_.Linear(linears[i].name, ShardAxis::kNone, 0, 1));
      NIBBLE_RETURN_IF_ERROR(writer_->Write(linears[i].name + ".weight", tensors.dense));
      if (linears[i].bias) NIBBLE_RETURN_IF_ERROR(writer_->Write(linears[i].name + ".bias", tensors.bias));
    }
    return Finish();
  }

  absl::Status WriteQuantized() {
    NIBBLE_ASSIGN_OR_RETURN(work_, WorkDirectory::Open(WorkPath(), run_, options_.resume));
    if (const absl::Status status = QuantizeLayers(); !status.ok()) {
      if (work_->layers_done() == 0) {
        work_->Remove().IgnoreError();
        return status;
      }
      return Annotate(status, absl::StrCat(work_->layers_done(), " of ", config_.num_layers, " layers are kept in ",
                                           WorkPath(), " for --resume"));
    }
    NIBBLE_RETURN_IF_ERROR(Assemble());
    NIBBLE_RETURN_IF_ERROR(Finish());
    return work_->Remove();
  }

  std::string WorkPath() const {
    std::string path = options_.output;
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    return path + ".work";
  }

  absl::Status QuantizeLayers() {
    const int64_t layers = config_.num_layers, done = work_->layers_done();
    listener_.Planned(layers_->PredictedPeakBytes(), done, layers);
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> basis, work_->LoadValues("basis"));
    const int64_t survey = basis.empty() ? layers_->steps_of_survey() : 0;
    const int64_t steps = survey + (layers - done) * layers_->steps_per_layer();
    int64_t step = 0;
    const LayerQuantizer::Step advance = [&](const std::string& next) {
      return listener_.Advanced(step++, steps, next);
    };
    NIBBLE_RETURN_IF_ERROR(layers_->Survey(basis, advance));
    if (basis.empty() && !layers_->basis().empty())
      NIBBLE_RETURN_IF_ERROR(work_->SaveValues("basis", layers_->basis()));

    NIBBLE_ASSIGN_OR_RETURN(std::vector<float> hidden, work_->LoadHidden());
    if (done == 0) {
      NIBBLE_ASSIGN_OR_RETURN(hidden, layers_->FirstHidden());
    }
    for (int64_t layer = done; layer < layers; ++layer) {
      NIBBLE_ASSIGN_OR_RETURN(const QuantizedLayer quantized, layers_->Quantize(layer, &hidden, advance));
      NIBBLE_RETURN_IF_ERROR(SaveLayer(layer, quantized, hidden));
    }
    return listener_.Advanced(steps, steps, "");
  }

  absl::Status SaveLayer(int64_t layer, const QuantizedLayer& quantized, const std::vector<float>& hidden) {
    const std::vector<LinearShape> shapes = DecoderLinears(config_);
    const std::vector<BF16> norms[] = {Rounded(quantized.input_norm), Rounded(quantized.post_attention_norm)};
    std::vector<WorkDirectory::Tensor> tensors = {
        {{NormName(layer, "input"), TensorType::kBF16, {config_.hidden_size}}, Bytes(norms[0])},
        {{NormName(layer, "post_attention"), TensorType::kBF16, {config_.hidden_size}}, Bytes(norms[1])}};
    nlohmann::json record = {{"coding_error", quantized.coding_error}, {"linears", nlohmann::json::array()}};
    for (size_t i = 0; i < kLayerLinears; ++i) {
      const LinearShape& shape = shapes[static_cast<size_t>(layer) * kLayerLinears + i];
      for (auto& part : LinearParts(shape, quantized.linears[i], Permutes())) tensors.push_back(std::move(part));
      record["linears"].push_back({{"name", shape.name},
                                   {"weight_error", quantized.weight_error[i]},
                                   {"output_error", std::sqrt(quantized.rounding[i].relative_error())},
                                   {"fallback", quantized.rounding[i].fallback}});
    }
    return work_->SaveLayer(tensors, record, hidden);
  }

  // The finished layers, and what is not a layer, into the output.
  absl::Status Assemble() {
    std::vector<LinearCost> costs;
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<SafeTensors> tensors, work_->LoadLayer(layer));
      for (const auto& [name, view] : tensors->tensors()) {
        NIBBLE_RETURN_IF_ERROR(
            writer_->Write(name, std::span<const uint8_t>(view.data, static_cast<size_t>(view.bytes))));
      }
      for (const char* reader : {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}) {
        NIBBLE_ASSIGN_OR_RETURN(const TensorView bits,
                                tensors->Get(absl::StrCat("model.layers.", layer, ".", reader, ".block_bits")));
        const int64_t eight = std::count(bits.data, bits.data + bits.bytes, 8);
        report_.blocks += bits.bytes;
        report_.eight_bit_blocks += eight;
        report_.eight_bit_per_input.push_back(eight);
      }
      NIBBLE_ASSIGN_OR_RETURN(const nlohmann::json record, work_->LoadRecord(layer));
      for (const auto& linear : record.at("linears")) {
        costs.push_back({.name = linear.at("name"),
                         .weight_error = linear.at("weight_error"),
                         .output_error = linear.at("output_error"),
                         .fallback = linear.at("fallback")});
      }
    }
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> embedding, layers_->Embedding());
    NIBBLE_RETURN_IF_ERROR(writer_->Write("model.embed_tokens.weight", embedding));
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> norm, layers_->FinalNorm());
    NIBBLE_RETURN_IF_ERROR(writer_->Write("model.norm.weight", norm));
    if (!layers_->config().tie_word_embeddings) {
      NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> head, layers_->Head());
      NIBBLE_RETURN_IF_ERROR(writer_->Write("lm_head.weight", head));
    }
    return writer_->WriteFile(kRoundingRecordFile, FormatRoundingRecord(costs));
  }

  absl::Status Finish() {
    NIBBLE_ASSIGN_OR_RETURN(nlohmann::json json, ReadJsonObject(options_.model + "/config.json"));
    json.erase("quantization_config");
    if (Quantizes()) {
      json["tie_word_embeddings"] = layers_->config().tie_word_embeddings;
      json["quantization_config"] = {{"quant_method", "nibble"},
                                     {"version", kQuantizedFormatVersion},
                                     {"mode", QuantizationName(options_.mode)},
                                     {"group_size", kBlock},
                                     {"blocks", report_.blocks},
                                     {"eight_bit_blocks", report_.eight_bit_blocks},
                                     {"row_segments", RowSegments(config_)},
                                     {"down_hadamard", layers_->config().down_hadamard},
                                     {"transforms", layers_->Transforms()},
                                     {"settings", SettingValues(options_.settings)},
                                     {"quantizer", absl::StrCat("nibble ", kVersion)}};
    }
    NIBBLE_RETURN_IF_ERROR(writer_->WriteFile("config.json", json.dump(2) + "\n"));
    NIBBLE_RETURN_IF_ERROR(CopyModelFiles(options_.model, writer_.get()));
    return writer_->Commit();
  }

  const QuantizeOptions& options_;
  const Checkpoint& source_;
  const ModelConfig& config_;
  QuantizeListener& listener_;

  nlohmann::json run_;
  std::unique_ptr<LayerQuantizer> layers_;
  std::optional<WorkDirectory> work_;
  std::unique_ptr<ModelWriter> writer_;
  QuantizeReport report_;
};

}  // namespace

absl::StatusOr<QuantizeReport> QuantizeModel(const QuantizeOptions& options, QuantizeListener* listener) {
  NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> source, Checkpoint::Open(options.model));
  return Quantizer(options, *source, listener).Run();
}

}  // namespace nibble
