#include "tools/quantize/report.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/model/checkpoint.h"
#include "common/model/json_file.h"
#include "common/text/tokenizer.h"
#include "tools/eval/engine_group.h"
#include "tools/eval/forwarding_ops.h"
#include "tools/eval/scorer.h"
#include "tools/quantize/rounding_record.h"

namespace nibble {
namespace {

constexpr const char* kInputNames[] = {"qkv", "o", "gate_up", "down"};
constexpr const char* kLinearNames[] = {"q", "k", "v", "o", "gate", "up", "down"};
constexpr size_t kInputsOfLayer = std::size(kInputNames), kLinearsOfLayer = std::size(kLinearNames);
constexpr size_t kReadersOf[] = {0, 3, 4, 6};  // the first linear that reads each input

// Largest |x| of every channel of every linear input of the decoder, in the order of the forward pass.
class ChannelWatcher : public ForwardingOps {
 public:
  ChannelWatcher(std::vector<std::vector<float>>* magnitudes, std::unique_ptr<Ops> backend)
      : ForwardingOps(std::move(backend)), magnitudes_(*magnitudes) {}

 protected:
  void DoLinear(const LinearArgs& args) override {
    backend().Linear(args);
    // The decoder's weights are met in order before the head's.
    const size_t index = order_.try_emplace(args.weight, order_.size()).first->second;
    if (index >= magnitudes_.size()) return;
    std::vector<float>& largest = magnitudes_[index];
    largest.resize(static_cast<size_t>(args.input.k), 0.0f);
    for (int64_t t = 0; t < args.input.rows; ++t) Add(args.input, t, &largest);
  }

 private:
  static void Add(const LinearInput& input, int64_t t, std::vector<float>* largest) {
    const size_t k = static_cast<size_t>(input.k);
    if (input.codes != nullptr) {
      const int8_t* codes = input.codes + t * input.k;
      for (size_t c = 0; c < k; ++c)
        (*largest)[c] = std::max((*largest)[c], input.scales[t] * std::fabs(static_cast<float>(codes[c])));
      return;
    }
    NIBBLE_CHECK(input.dense.dtype == DType::kF32);
    const float* x = static_cast<const float*>(input.dense.data) + t * input.k;
    for (size_t c = 0; c < k; ++c) (*largest)[c] = std::max((*largest)[c], std::fabs(x[c]));
  }

  std::vector<std::vector<float>>& magnitudes_;  // [layers · inputs]
  std::unordered_map<const Weight*, size_t> order_;
};

// Divides by the median and joins neighbours. Returns the largest.
double Picture(std::vector<float> magnitudes, std::vector<float>* bins) {
  if (magnitudes.empty()) return 0;
  std::vector<float> sorted = magnitudes;
  const auto middle = sorted.begin() + static_cast<ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  const float median = *middle > 0 ? *middle : 1.0f;
  bins->assign(std::min(kPictureBins, magnitudes.size()), 0.0f);
  for (size_t c = 0; c < magnitudes.size(); ++c) {
    float& bin = (*bins)[c * bins->size() / magnitudes.size()];
    bin = std::max(bin, magnitudes[c] / median);
  }
  return static_cast<double>(*std::ranges::max_element(*bins));
}

struct Watched {
  std::unique_ptr<EngineGroup> group;
  LogitsTap tap;
  std::vector<std::vector<float>> magnitudes;

  absl::Status Open(const Checkpoint& checkpoint, const ReportOptions& options) {
    const ModelConfig& config = checkpoint.config();
    magnitudes.resize(static_cast<size_t>(config.num_layers) * kInputsOfLayer);
    NIBBLE_ASSIGN_OR_RETURN(
        group, EngineGroup::Create(
                   checkpoint, {.threads_per_rank = options.threads,
                                .limits = ScoringLimits(config, 1, options.window, DivergenceStepTokens(config.vocab_size)),
                                .wrap_ops = [this](int rank, std::unique_ptr<Ops> ops) {
                                  return tap.Wrap(rank, std::make_unique<ChannelWatcher>(&magnitudes, std::move(ops)));
                                }}));
    return absl::OkStatus();
  }
};

absl::StatusOr<std::vector<std::vector<uint32_t>>> Windows(const ReportOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model));
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(options.text, Tokenizer::kMaxTextBytes));
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids,
                          tokenizer->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false}));
  const int64_t count = std::min(options.max_windows, static_cast<int64_t>(ids.size()) / options.window);
  if (count == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.text, ": has ", ids.size(), " tokens, fewer than one window of ", options.window));
  }
  std::vector<std::vector<uint32_t>> windows;
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = ids.begin() + i * options.window;
    windows.emplace_back(begin, begin + options.window);
  }
  return windows;
}

absl::Status ReadText(const ReportOptions& options, const Checkpoint& model, const Checkpoint& quantized,
                      const std::function<void(int64_t, int64_t)>& progress, QuantizationReport* report) {
  NIBBLE_ASSIGN_OR_RETURN(const auto windows, Windows(options));
  Watched before, after;
  NIBBLE_RETURN_IF_ERROR(before.Open(model, options));
  NIBBLE_RETURN_IF_ERROR(after.Open(quantized, options));
  int64_t done = 0;
  NIBBLE_ASSIGN_OR_RETURN(
      report->divergence,
      CompareDistributions({*after.group, after.tap}, {*before.group, before.tap}, windows, model.config().vocab_size,
                           options.threads, [&](int64_t n) {
                             done += n;
                             if (progress) progress(done, static_cast<int64_t>(windows.size()));
                           }));
  report->window = options.window;
  for (size_t i = 0; i < report->layers.size(); ++i) {
    for (size_t j = 0; j < kInputsOfLayer; ++j) {
      InputReport& input = report->layers[i].inputs[j];
      input.before_peak = Picture(before.magnitudes[i * kInputsOfLayer + j], &input.before);
      input.after_peak = Picture(after.magnitudes[i * kInputsOfLayer + j], &input.after);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPair(const ReportOptions& options, const ModelConfig& model, const ModelConfig& quantized) {
  if (model.quantization != Quantization::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat(options.model, ": is quantized, must be the float model"));
  }
  if (quantized.quantization == Quantization::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat(options.quantized, ": is not quantized"));
  }
  const struct {
    const char* field;
    int64_t model, quantized;
  } fields[] = {{"num_hidden_layers", model.num_layers, quantized.num_layers},
                {"hidden_size", model.hidden_size, quantized.hidden_size},
                {"intermediate_size", model.intermediate_size, quantized.intermediate_size},
                {"num_key_value_heads", model.num_kv_heads, quantized.num_kv_heads},
                {"vocab_size", model.vocab_size, quantized.vocab_size}};
  for (const auto& f : fields) {
    if (f.model == f.quantized) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(options.quantized, ": ", f.field, " is ", f.quantized, ", the float model's is ", f.model));
  }
  return absl::OkStatus();
}

const char* PartOf(const std::string& tensor) {
  if (tensor.find("_proj.") != std::string::npos) return "linears";
  return tensor.find("norm") != std::string::npos ? "norms" : "embedding and head";
}

void AddSizes(const Checkpoint& model, const Checkpoint& quantized, QuantizationReport* report) {
  for (const char* part : {"linears", "embedding and head", "norms"}) report->sizes.push_back({.part = part});
  const auto add = [&](const Checkpoint& checkpoint, int64_t QuantizationReport::Size::* bytes) {
    for (const auto& [name, view] : checkpoint.tensors().tensors()) {
      for (QuantizationReport::Size& size : report->sizes) {
        if (size.part == PartOf(name)) size.*bytes += view.bytes;
      }
    }
  };
  add(model, &QuantizationReport::Size::float_bytes);
  add(quantized, &QuantizationReport::Size::quantized_bytes);
  for (const auto& [name, view] : model.tensors().tensors()) report->parameters += view.bytes / SizeOf(view.type);
  const ModelConfig& config = model.config();
  const KvLayout kv4 = {.format = KvFormat::kKV4, .kv_heads = config.num_kv_heads, .head_dim = config.head_dim};
  report->kv_bytes_per_token = config.num_layers * kv4.page_bytes() / kPageTokens;
  report->float_kv_bytes_per_token = config.num_layers * config.num_kv_heads * config.head_dim * 2 * 2;
}

absl::Status AddLayers(const ReportOptions& options, const Checkpoint& quantized, QuantizationReport* report) {
  const absl::StatusOr<std::vector<LinearCost>> record = LoadRoundingRecord(options.quantized);
  if (!record.ok() && !absl::IsNotFound(record.status())) return record.status();
  std::unordered_map<std::string, LinearCost> costs;
  if (record.ok()) {
    for (const LinearCost& cost : *record) costs[cost.name] = cost;
  }
  const std::vector<LinearShape> shapes = DecoderLinears(quantized.config());
  for (size_t i = 0; i < shapes.size() / kLinearsOfLayer; ++i) {
    LayerReport layer;
    for (size_t j = 0; j < kLinearsOfLayer; ++j) {
      LinearReport linear{.name = kLinearNames[j]};
      if (const auto it = costs.find(shapes[i * kLinearsOfLayer + j].name); it != costs.end()) {
        linear.weight_error = it->second.weight_error;
        linear.output_error = it->second.output_error;
        linear.fallback = it->second.fallback;
      }
      layer.linears.push_back(std::move(linear));
    }
    for (size_t j = 0; j < kInputsOfLayer; ++j) {
      const LinearShape& shape = shapes[i * kLinearsOfLayer + kReadersOf[j]];
      const int64_t blocks[] = {shape.k / kBlock};
      NIBBLE_ASSIGN_OR_RETURN(const TensorView bits,
                              quantized.tensors().Get(shape.name + ".block_bits", TensorType::kU8, blocks));
      layer.inputs.push_back({.name = kInputNames[j], .block_bits = {bits.data, bits.data + bits.bytes}});
    }
    report->layers.push_back(std::move(layer));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t InputReport::eight_bit_blocks() const { return std::count(block_bits.begin(), block_bits.end(), 8); }

int64_t QuantizationReport::blocks() const {
  int64_t sum = 0;
  for (const LayerReport& layer : layers) {
    for (const InputReport& input : layer.inputs) sum += static_cast<int64_t>(input.block_bits.size());
  }
  return sum;
}

int64_t QuantizationReport::eight_bit_blocks() const {
  int64_t sum = 0;
  for (const LayerReport& layer : layers) {
    for (const InputReport& input : layer.inputs) sum += input.eight_bit_blocks();
  }
  return sum;
}

int64_t QuantizationReport::float_bytes() const {
  int64_t sum = 0;
  for (const Size& size : sizes) sum += size.float_bytes;
  return sum;
}

int64_t QuantizationReport::quantized_bytes() const {
  int64_t sum = 0;
  for (const Size& size : sizes) sum += size.quantized_bytes;
  return sum;
}

absl::StatusOr<QuantizationReport> BuildReport(const ReportOptions& options,
                                               const std::function<void(int64_t done, int64_t total)>& progress) {
  NIBBLE_ASSIGN_OR_RETURN(const auto model, Checkpoint::Open(options.model));
  NIBBLE_ASSIGN_OR_RETURN(const auto quantized, Checkpoint::Open(options.quantized));
  NIBBLE_RETURN_IF_ERROR(CheckPair(options, model->config(), quantized->config()));
  QuantizationReport report{.model = options.model,
                            .quantized = options.quantized,
                            .mode = QuantizationName(quantized->config().quantization)};
  NIBBLE_ASSIGN_OR_RETURN(const nlohmann::json config, ReadJsonObject(options.quantized + "/config.json"));
  for (const auto& [key, value] : config["quantization_config"].items()) {
    if (value.is_object()) {
      for (const auto& [name, setting] : value.items()) {
        report.settings[name] = setting.is_string() ? setting.get<std::string>() : setting.dump();
      }
    } else {
      report.settings[key] = value.is_string() ? value.get<std::string>() : value.dump();
    }
  }
  AddSizes(*model, *quantized, &report);
  NIBBLE_RETURN_IF_ERROR(AddLayers(options, *quantized, &report));
  if (!options.text.empty()) NIBBLE_RETURN_IF_ERROR(ReadText(options, *model, *quantized, progress, &report));
  return report;
}

}  // namespace nibble
