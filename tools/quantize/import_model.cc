#include "tools/quantize/import_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/float16.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/model/checkpoint.h"
#include "common/model/json_file.h"
#include "common/model/writer.h"
#include "kernels/ops.h"
#include "tools/quantize/import_grid.h"
#include "tools/quantize/import_packing.h"
#include "tools/quantize/model_files.h"

namespace nibble {
namespace {

struct Source {
  std::string method;
  PackedFormat format = PackedFormat::kGptq;
};

// What quantization_config says, and whether that can be imported.
absl::StatusOr<Source> ReadSource(const nlohmann::json& config, const std::string& path) {
  const auto block = config.find("quantization_config");
  if (block == config.end() || !block->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": has no quantization_config: quantize the model instead of importing it"));
  }
  const auto text = [&](const char* name, const char* absent) {
    const auto it = block->find(name);
    return it != block->end() && it->is_string() ? it->get<std::string>() : std::string(absent);
  };
  const auto refuse = [&](const char* field, const std::string& reason) {
    return absl::UnimplementedError(absl::StrCat(path, ": quantization_config.", field, " ", reason));
  };
  const auto expect = [&](const char* field, int64_t want) -> absl::Status {
    const auto it = block->find(field);
    if (it == block->end() || !it->is_number_integer())
      return refuse(field, absl::StrCat("is missing, must be ", want));
    const int64_t value = it->get<int64_t>();
    return value == want ? absl::OkStatus() : refuse(field, absl::StrCat("is ", value, ", must be ", want));
  };

  Source source{.method = text("quant_method", ""), .format = PackedFormat::kGptq};
  if (source.method == "awq") {
    source.format = PackedFormat::kAwq;
    const std::string version = text("version", "gemm");
    if (version != "gemm" && version != "GEMM") {
      return refuse("version",
                    absl::StrCat("is ", Quoted(version), ", must be gemm: other versions pack weights otherwise"));
    }
  } else if (source.method == "gptq") {
    const std::string format = text("checkpoint_format", "gptq");
    if (format != "gptq" && format != "gptq_v2") {
      return refuse("checkpoint_format", absl::StrCat("is ", Quoted(format), ", must be gptq or gptq_v2"));
    }
    if (format == "gptq_v2") source.format = PackedFormat::kGptqV2;
  } else {
    return refuse("quant_method", absl::StrCat("is ", Quoted(source.method), ", must be awq or gptq"));
  }
  NIBBLE_RETURN_IF_ERROR(expect(block->contains("bits") ? "bits" : "w_bit", 4));
  NIBBLE_RETURN_IF_ERROR(expect(block->contains("group_size") ? "group_size" : "q_group_size", kBlock));
  return source;
}

class Importer {
 public:
  Importer(const ImportOptions& options, const std::function<absl::Status(int64_t, int64_t)>& progress)
      : options_(options), progress_(progress), pool_(std::max(1, options.threads)) {}

  absl::StatusOr<ImportReport> Run() {
    const std::string path = options_.model + "/config.json";
    NIBBLE_ASSIGN_OR_RETURN(json_, ReadJsonObject(path));
    NIBBLE_ASSIGN_OR_RETURN(const Source source, ReadSource(json_, path));
    NIBBLE_ASSIGN_OR_RETURN(config_, LoadModelConfig(options_.model, ForeignQuantization::kIgnore));
    NIBBLE_ASSIGN_OR_RETURN(tensors_, SafeTensors::Open(options_.model));
    report_.method = source.method;

    const std::vector<LinearShape> linears = DecoderLinears(config_);
    NIBBLE_RETURN_IF_ERROR(CreateWriter(linears));
    for (const auto& [name, shape] : DenseTensors(config_)) NIBBLE_RETURN_IF_ERROR(CopyDense(name, shape));
    if (!config_.tie_word_embeddings) {
      NIBBLE_RETURN_IF_ERROR(CopyDense("lm_head.weight", {config_.vocab_size, config_.hidden_size}));
    }
    for (const LinearShape& shape : linears) {
      NIBBLE_RETURN_IF_ERROR(ImportLinear(shape, source.format));
      NIBBLE_RETURN_IF_ERROR(progress_(++report_.linears, static_cast<int64_t>(linears.size())));
    }
    NIBBLE_RETURN_IF_ERROR(WriteConfig());
    NIBBLE_RETURN_IF_ERROR(CopyModelFiles(options_.model, writer_.get()));
    NIBBLE_RETURN_IF_ERROR(writer_->Commit());
    return report_;
  }

 private:
  absl::Status CreateWriter(const std::vector<LinearShape>& linears) {
    std::vector<TensorSpec> specs;
    for (const auto& [name, shape] : DenseTensors(config_)) specs.push_back({name, TensorType::kBF16, shape});
    if (!config_.tie_word_embeddings) {
      specs.push_back({"lm_head.weight", TensorType::kBF16, {config_.vocab_size, config_.hidden_size}});
    }
    for (const LinearShape& l : linears) {
      specs.push_back({l.name + ".qweight", TensorType::kU8, {l.n, l.k / 2}});
      specs.push_back({l.name + ".group_scale", TensorType::kU8, {l.n, l.k / kBlock}});
      specs.push_back({l.name + ".group_min", TensorType::kI8, {l.n, l.k / kBlock}});
      specs.push_back({l.name + ".channel_scale", TensorType::kF32, {l.n}});
      specs.push_back({l.name + ".block_bits", TensorType::kU8, {l.k / kBlock}});
      if (l.bias) specs.push_back({l.name + ".bias", TensorType::kF32, {l.n}});
    }
    NIBBLE_ASSIGN_OR_RETURN(
        writer_,
        ModelWriter::Create(options_.output, specs,
                            {.overwrite = options_.overwrite,
                             .max_shard_bytes = options_.max_shard_bytes,
                             .metadata = {{"format", "pt"}, {"quantizer", absl::StrCat("nibble ", kVersion)}}}));
    report_.output_bytes = writer_->total_bytes();
    return absl::OkStatus();
  }

  // f32 values of an f32, f16 or bf16 tensor.
  absl::StatusOr<std::vector<float>> Floats(const std::string& name, const std::vector<int64_t>& shape) const {
    NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors_->Get(name));
    NIBBLE_RETURN_IF_ERROR(tensors_->Get(name, view.type, shape).status());
    if (view.type != TensorType::kF32 && view.type != TensorType::kF16 && view.type != TensorType::kBF16) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is ", TensorTypeName(view.type), ", must be F32, F16 or BF16"));
    }
    std::vector<float> values(static_cast<size_t>(view.bytes / SizeOf(view.type)));
    for (size_t i = 0; i < values.size(); ++i) {
      uint16_t half = 0;
      if (view.type == TensorType::kF32) {
        std::memcpy(&values[i], view.data + 4 * i, 4);
      } else {
        std::memcpy(&half, view.data + 2 * i, 2);
        values[i] = view.type == TensorType::kF16 ? ToFloat(F16{half}) : ToFloat(BF16{half});
      }
      if (!std::isfinite(values[i])) {
        return absl::InvalidArgumentError(absl::StrCat(name, ": element ", i, " is ", values[i], ", must be finite"));
      }
    }
    return values;
  }

  absl::Status CopyDense(const std::string& name, const std::vector<int64_t>& shape) {
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> values, Floats(name, shape));
    std::vector<BF16> narrow(values.size());
    std::transform(values.begin(), values.end(), narrow.begin(), [](float x) { return ToBF16(x); });
    return writer_->Write(name, narrow);
  }

  absl::Status ImportLinear(const LinearShape& shape, PackedFormat format) {
    if (!tensors_->Has(shape.name + ".qweight") && tensors_->Has(shape.name + ".weight")) {
      return absl::UnimplementedError(
          absl::StrCat(shape.name, " is not quantized (modules_to_not_convert), must be in four bits"));
    }
    NIBBLE_ASSIGN_OR_RETURN(const ForeignLinear linear, UnpackLinear(*tensors_, shape, format));
    GridFit fit;
    const LinearTensors out = MapOntoGrid(linear, shape, &pool_, &fit);
    if (fit.rms_steps > options_.max_rms_steps) {
      return absl::UnimplementedError(absl::StrCat(shape.name,
                                                   ".scales do not fit the two-level grid: weights would move by ",
                                                   fit.rms_steps, " steps (root mean square), must be at most ",
                                                   options_.max_rms_steps, "; quantize the original model instead"));
    }
    if (fit.exact()) ++report_.exact;
    if (fit.rms_steps > report_.rms_steps) report_.rms_steps = fit.rms_steps, report_.worst = shape.name;
    NIBBLE_RETURN_IF_ERROR(writer_->Write(shape.name + ".qweight", out.qweight));
    NIBBLE_RETURN_IF_ERROR(writer_->Write(shape.name + ".group_scale", out.group_scale));
    NIBBLE_RETURN_IF_ERROR(writer_->Write(shape.name + ".group_min", out.group_min));
    NIBBLE_RETURN_IF_ERROR(writer_->Write(shape.name + ".channel_scale", out.channel_scale));
    NIBBLE_RETURN_IF_ERROR(writer_->Write(shape.name + ".block_bits", out.block_bits));
    if (!shape.bias) return absl::OkStatus();
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> bias, Floats(shape.name + ".bias", {shape.n}));
    return writer_->Write(shape.name + ".bias", bias);
  }

  absl::Status WriteConfig() {
    int64_t blocks = 0;
    for (const LinearShape& l : DecoderLinears(config_)) blocks += l.k / kBlock;
    json_["quantization_config"] = {{"quant_method", "nibble"},
                                    {"version", kQuantizedFormatVersion},
                                    {"mode", QuantizationName(Quantization::kW4A8KV4)},
                                    {"group_size", kBlock},
                                    {"blocks", blocks},
                                    {"eight_bit_blocks", blocks},
                                    {"row_segments", RowSegments(config_)},
                                    {"down_hadamard", 0},
                                    {"transforms", {absl::StrCat("imported_", report_.method)}},
                                    {"quantizer", absl::StrCat("nibble ", kVersion)}};
    return writer_->WriteFile("config.json", json_.dump(2) + "\n");
  }

  const ImportOptions& options_;
  const std::function<absl::Status(int64_t, int64_t)>& progress_;
  ThreadPool pool_;
  nlohmann::json json_;
  ModelConfig config_;
  std::unique_ptr<SafeTensors> tensors_;
  std::unique_ptr<ModelWriter> writer_;
  ImportReport report_;
};

}  // namespace

absl::StatusOr<ImportReport> ImportModel(const ImportOptions& options,
                                         const std::function<absl::Status(int64_t, int64_t)>& progress) {
  return Importer(options, progress).Run();
}

}  // namespace nibble
