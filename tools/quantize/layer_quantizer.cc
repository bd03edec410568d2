#include "tools/quantize/layer_quantizer.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "tools/quantize/rounding_record.h"
#include "tools/quantize/transforms.h"

namespace nibble {
namespace {

constexpr int64_t kWindowsPerRun = 4;
constexpr int64_t kScoutWindows = 8;   // of which transforms and plans see the inputs
constexpr int64_t kSurveyWindows = 8;  // of which the residual's principal directions are taken
constexpr double kWeightShare = 0.5;   // of the weights in these directions, relative to the inputs

bool IsRowParallel(LayerInput which) { return which == LayerInput::kO || which == LayerInput::kDown; }

constexpr const char* kLinearNames[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

int64_t InputChannels(const DenseLayer& layer, LayerInput which) {
  constexpr LayerLinear kReaders[kLayerInputs] = {LayerLinear::kQ, LayerLinear::kO, LayerLinear::kGate,
                                                  LayerLinear::kDown};
  return layer.linear(kReaders[static_cast<size_t>(which)]).shape.k;
}

int64_t RunsOf(size_t windows) { return (static_cast<int64_t>(windows) + kWindowsPerRun - 1) / kWindowsPerRun; }

template <typename T>
std::vector<T> Spread(const std::vector<T>& values, int64_t count) {
  std::vector<T> out;
  const int64_t size = static_cast<int64_t>(values.size());
  for (int64_t i = 0; i < std::min(count, size); ++i)
    out.push_back(values[static_cast<size_t>(i * size / std::min(count, size))]);
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LayerQuantizer>> LayerQuantizer::Create(const Checkpoint& source,
                                                                       std::vector<std::vector<uint32_t>> windows,
                                                                       const LayerQuantizerOptions& options) {
  NIBBLE_CHECK(options.mode != Quantization::kBF16 && !windows.empty());
  for (const LinearShape& shape : DecoderLinears(source.config())) {
    if (shape.k % kBlock == 0) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        shape.name, " has ", shape.k, " input channels, must be a multiple of ", kBlock, " to be quantized"));
  }
  std::unique_ptr<LayerQuantizer> quantizer(new LayerQuantizer(source, std::move(windows), options));
  NIBBLE_ASSIGN_OR_RETURN(quantizer->runner_,
                          LayerRunner::Create(source.config(), {.threads = options.threads,
                                                                .window_tokens = quantizer->window_tokens_,
                                                                .windows_per_run = kWindowsPerRun}));
  NIBBLE_ASSIGN_OR_RETURN(quantizer->rounding_,
                          CreateRoundingDevice({.device = options.device, .threads = options.threads}));
  return quantizer;
}

LayerQuantizer::LayerQuantizer(const Checkpoint& source, std::vector<std::vector<uint32_t>> windows,
                               const LayerQuantizerOptions& options)
    : source_(source),
      windows_(std::move(windows)),
      options_(options),
      window_tokens_(static_cast<int64_t>(windows_.front().size())),
      config_(source.config()),
      pool_(options.threads) {
  for (const auto& window : windows_) NIBBLE_CHECK_EQ(static_cast<int64_t>(window.size()), window_tokens_);
  config_.quantization = options_.mode;
  if (RotatesResidual()) config_.tie_word_embeddings = false;
  if (options_.settings.rotate_down) config_.down_hadamard = DownHadamardSize(config_);
}

// With every block in 8 bits there is no leading part to fill.
bool LayerQuantizer::NeedsSurvey() const {
  return options_.settings.rotate_residual == ResidualRotation::kPrincipal && EightBitBlocks(config_.hidden_size) > 0;
}

int64_t LayerQuantizer::steps_of_survey() const { return NeedsSurvey() ? config_.num_layers : 0; }

int64_t LayerQuantizer::steps_per_layer() const {
  const int64_t passes = options_.settings.quantized_flow ? 2 : 1;
  return 1 + passes * RunsOf(windows_.size()) + static_cast<int64_t>(kLayerLinears);
}

// In w4a4kv4; 0 in w4a8kv4, where the question does not arise.
int64_t LayerQuantizer::EightBitBlocks(int64_t k) const {
  if (options_.mode == Quantization::kW4A8KV4 || options_.settings.eight_bit_share == 0) return 0;
  return EightBitBudget(k, options_.settings.eight_bit_share);
}

std::span<const float> LayerQuantizer::basis() const {
  return rotation_ == nullptr ? std::span<const float>() : rotation_->basis();
}

absl::Status LayerQuantizer::Survey(std::span<const float> basis, const Step& step) {
  if (!RotatesResidual()) return absl::OkStatus();
  const int64_t h = config_.hidden_size;
  const uint64_t seed = static_cast<uint64_t>(options_.settings.seed);
  if (!NeedsSurvey()) {
    rotation_ = std::make_unique<Rotation>(Rotation::Hadamard(h, seed));
    return absl::OkStatus();
  }
  std::vector<float> directions(basis.begin(), basis.end());
  const int64_t leading = EightBitBlocks(h) * kBlock;
  if (directions.empty()) {
    // Every linear that reads the residual reads x / rms(x): all sites count alike.
    NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<InputMoments> moments, rounding_->CreateMoments(h, false));
    const auto see = [&](LayerInput which, std::span<const float> rows) {
      return IsRowParallel(which) ? absl::OkStatus() : rounding_->Accumulate(rows, moments.get());
    };
    NIBBLE_ASSIGN_OR_RETURN(std::vector<float> hidden, Embed(Spread(windows_, kSurveyWindows)));
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      NIBBLE_RETURN_IF_ERROR(step(absl::StrCat("layer ", layer, " survey")));
      NIBBLE_ASSIGN_OR_RETURN(DenseLayer dense, LoadDenseLayer(source_, layer));
      FoldNorms(&dense);
      for (const LayerInput input : {LayerInput::kQkv, LayerInput::kGateUp}) {
        NIBBLE_RETURN_IF_ERROR(SurveyWeights(dense, input, static_cast<double>(hidden.size()), moments.get()));
      }
      NIBBLE_RETURN_IF_ERROR(runner_->LoadDense(dense, 0));
      for (size_t at = 0; at < hidden.size(); at += static_cast<size_t>(runner_->rows_per_run() * h)) {
        const size_t count = std::min(hidden.size() - at, static_cast<size_t>(runner_->rows_per_run() * h));
        NIBBLE_RETURN_IF_ERROR(runner_->Run(std::span(hidden).subspan(at, count), {.input = see}));
      }
    }
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> hessian, moments->Hessian());
    directions = PrincipalBasis(hessian, h, leading, seed, &pool_);
  }
  rotation_ = std::make_unique<Rotation>(Rotation::Principal(std::move(directions), h, leading, seed));
  return absl::OkStatus();
}

absl::Status LayerQuantizer::SurveyWeights(const DenseLayer& layer, LayerInput input, double energy,
                                           InputMoments* moments) {
  double weight_energy = 0;
  for (const float column : ColumnEnergy(layer, input)) weight_energy += static_cast<double>(column);
  if (!(weight_energy > 0)) return absl::OkStatus();
  const float scale = static_cast<float>(std::sqrt(kWeightShare * energy / weight_energy));
  for (size_t i = 0; i < kLayerLinears; ++i) {
    if (InputOf(static_cast<LayerLinear>(i)) != input) continue;
    std::vector<float> rows = layer.linears[i].weight;
    for (float& w : rows) w *= scale;
    NIBBLE_RETURN_IF_ERROR(rounding_->Accumulate(rows, moments));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> LayerQuantizer::Embed(const std::vector<std::vector<uint32_t>>& windows) const {
  const int64_t h = config_.hidden_size;
  const int64_t shape[] = {config_.vocab_size, h};
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> table, source_.Dense("model.embed_tokens.weight", shape));
  std::vector<float> hidden;
  hidden.reserve(windows.size() * static_cast<size_t>(window_tokens_ * h));
  for (const auto& window : windows) {
    for (const uint32_t token : window) {
      const auto row = table.begin() + static_cast<ptrdiff_t>(token) * h;
      std::transform(row, row + h, std::back_inserter(hidden), [](BF16 x) { return ToFloat(x); });
    }
  }
  return hidden;
}

absl::StatusOr<std::vector<float>> LayerQuantizer::FirstHidden() const {
  NIBBLE_ASSIGN_OR_RETURN(std::vector<float> hidden, Embed(windows_));
  if (rotation_ != nullptr) rotation_->ApplyToRows(hidden, &pool_);
  return hidden;
}

absl::StatusOr<LayerStatistics> LayerQuantizer::Scout(const DenseLayer& layer, const std::vector<float>& hidden) {
  const int64_t window = window_tokens_ * config_.hidden_size;
  const int64_t windows = static_cast<int64_t>(windows_.size()), count = std::min(kScoutWindows, windows);
  const int64_t stride = std::max<int64_t>(1, count * window_tokens_ / options_.sample_rows);
  LayerStatistics statistics;
  statistics.key_max.assign(static_cast<size_t>(config_.num_kv_heads * config_.head_dim), 0.0f);
  for (size_t i = 0; i < kLayerInputs; ++i) statistics.inputs[i].k = InputChannels(layer, static_cast<LayerInput>(i));
  LayerTaps taps;
  taps.input = [&](LayerInput which, std::span<const float> rows) {
    InputStatistics& input = statistics.input(which);
    const size_t k = static_cast<size_t>(input.k);
    for (size_t row = 0; row + k <= rows.size(); row += k * static_cast<size_t>(stride)) {
      const std::span<const float> x = rows.subspan(row, k);
      input.samples.insert(input.samples.end(), x.begin(), x.end());
    }
    return absl::OkStatus();
  };
  taps.keys = [&](std::span<const float> keys) {
    const std::vector<float> max = ChannelMax(keys, static_cast<int64_t>(statistics.key_max.size()));
    for (size_t c = 0; c < max.size(); ++c) statistics.key_max[c] = std::max(statistics.key_max[c], max[c]);
  };

  NIBBLE_RETURN_IF_ERROR(runner_->LoadDense(layer, 0));
  std::vector<float> chunk;
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = hidden.begin() + static_cast<ptrdiff_t>(i * windows / count * window);
    chunk.insert(chunk.end(), begin, begin + static_cast<ptrdiff_t>(window));
    if (static_cast<int64_t>(chunk.size()) < kWindowsPerRun * window && i + 1 < count) continue;
    NIBBLE_RETURN_IF_ERROR(runner_->Run(chunk, taps));
    chunk.clear();
  }
  for (InputStatistics& input : statistics.inputs) input.mean_square = MeanSquare(input.samples, input.k);
  return statistics;
}

absl::StatusOr<InputPlan> LayerQuantizer::Plan(const DenseLayer& layer, const LayerStatistics& statistics,
                                               LayerInput which, double* coding_error) {
  const InputStatistics& input = statistics.input(which);
  const std::vector<float> column_energy = ColumnEnergy(layer, which);
  std::vector<int32_t> perm;
  if (options_.settings.permute != ChannelOrder::kOff) {
    std::vector<float> importance = ChannelMax(input.samples, input.k);
    if (options_.settings.permute == ChannelOrder::kEnergy) {
      for (size_t c = 0; c < importance.size(); ++c) importance[c] = std::sqrt(input.mean_square[c] * column_energy[c]);
    }
    perm = SortChannels(importance, IsRowParallel(which) ? RowSegments(config_) : 1);
  }
  InputPlan plan = EightBitPlan(input.k);
  plan.perm = perm;
  if (options_.mode == Quantization::kW4A4KV4) {
    NIBBLE_ASSIGN_OR_RETURN(plan, PlanByOutputError(&runner_->ops(), input.samples, column_energy, std::move(perm),
                                                    EightBitBlocks(input.k)));
  }
  NIBBLE_ASSIGN_OR_RETURN(*coding_error, CodingError(&runner_->ops(), input.samples, column_energy, plan));
  return plan;
}

absl::StatusOr<LayerQuantizer::Moments> LayerQuantizer::Accumulate(const DenseLayer& layer, const Plans& plans,
                                                                   std::vector<float>* hidden, const Step& step) {
  const bool coded = options_.settings.coded_inputs;
  Moments moments;
  for (size_t i = 0; i < kLayerInputs; ++i) {
    NIBBLE_ASSIGN_OR_RETURN(moments[i],
                            rounding_->CreateMoments(InputChannels(layer, static_cast<LayerInput>(i)), coded));
  }
  const LayerTaps taps = {.input = [&](LayerInput which, std::span<const float> rows) -> absl::Status {
    InputMoments* sums = moments[static_cast<size_t>(which)].get();
    if (!coded) return rounding_->Accumulate(rows, sums);
    NIBBLE_ASSIGN_OR_RETURN(const std::vector<float> read,
                            CodeRows(&runner_->ops(), rows, sums->k(), plans[static_cast<size_t>(which)]));
    return rounding_->Accumulate(rows, read, sums);
  }};
  NIBBLE_RETURN_IF_ERROR(runner_->LoadDense(layer, config_.down_hadamard));
  NIBBLE_RETURN_IF_ERROR(Flow(hidden, taps, step));
  return moments;
}

absl::Status LayerQuantizer::Flow(std::vector<float>* hidden, const LayerTaps& taps, const Step& step) {
  const size_t run = static_cast<size_t>(runner_->rows_per_run() * config_.hidden_size);
  for (size_t at = 0; at < hidden->size(); at += run) {
    NIBBLE_RETURN_IF_ERROR(step("calibrate"));
    NIBBLE_RETURN_IF_ERROR(runner_->Run(std::span(*hidden).subspan(at, std::min(run, hidden->size() - at)), taps));
  }
  return absl::OkStatus();
}

absl::StatusOr<QuantizedLayer> LayerQuantizer::Quantize(int64_t layer, std::vector<float>* hidden, const Step& step) {
  const QuantizeSettings& settings = options_.settings;
  const Step in_layer = [&](const std::string& next) { return step(absl::StrCat("layer ", layer, " ", next)); };
  NIBBLE_RETURN_IF_ERROR(in_layer("plan"));
  NIBBLE_ASSIGN_OR_RETURN(DenseLayer dense, LoadDenseLayer(source_, layer));
  if (rotation_ != nullptr) {
    FoldNorms(&dense);
    RotateResidual(*rotation_, &dense, &pool_);
  }

  QuantizedLayer out;
  Plans plans;
  {
    NIBBLE_ASSIGN_OR_RETURN(LayerStatistics statistics, Scout(dense, *hidden));
    if (settings.smooth_attention > 0) SmoothAttention(config_, settings.smooth_attention, &statistics, &dense);
    if (settings.smooth_output > 0) {
      SmoothOutputs(config_, settings.smooth_output, settings.rotate_heads, settings.rotate_down, &statistics, &dense);
    }
    if (settings.rotate_heads) RotateHeads(config_, &statistics, &dense);
    if (settings.sort_neurons)
      SortNeurons(RowSegments(config_), std::max(config_.down_hadamard, kBlock), &statistics, &dense);
    if (settings.rotate_down) RotateDown(config_.down_hadamard, &statistics, &dense);
    for (size_t i = 0; i < kLayerInputs; ++i) {
      NIBBLE_ASSIGN_OR_RETURN(plans[i], Plan(dense, statistics, static_cast<LayerInput>(i), &out.coding_error[i]));
    }
  }

  // With quantized_flow the next layer reads what the quantized layer makes of the same input.
  std::vector<float> kept;
  if (settings.quantized_flow) kept = *hidden;
  NIBBLE_ASSIGN_OR_RETURN(Moments moments, Accumulate(dense, plans, hidden, in_layer));
  const GptqOptions options = Rounding();
  for (size_t i = 0; i < kLayerInputs; ++i) {
    std::unique_ptr<RoundingFactor> factor;
    for (size_t j = 0; j < kLayerLinears; ++j) {
      if (InputOf(static_cast<LayerLinear>(j)) != static_cast<LayerInput>(i)) continue;
      NIBBLE_RETURN_IF_ERROR(in_layer(kLinearNames[j]));
      if (factor == nullptr) {
        NIBBLE_ASSIGN_OR_RETURN(factor, rounding_->Factorize(*moments[i], plans[i], options));
      }
      NIBBLE_ASSIGN_OR_RETURN(RoundedLinear rounded,
                              rounding_->Round(dense.linears[j], plans[i], *moments[i], *factor, options));
      out.weight_error[j] = WeightError(dense.linears[j].weight, DequantizeLinear(rounded.tensors));
      out.linears[j] = std::move(rounded.tensors);
      out.rounding[j] = std::move(rounded.report);
    }
    moments[i].reset();
  }
  if (settings.quantized_flow) {
    *hidden = std::move(kept);
    NIBBLE_RETURN_IF_ERROR(runner_->LoadQuantized(dense, out.linears, config_.down_hadamard));
    NIBBLE_RETURN_IF_ERROR(Flow(hidden, {}, in_layer));
  }
  out.input_norm = std::move(dense.input_norm);
  out.post_attention_norm = std::move(dense.post_attention_norm);
  return out;
}

GptqOptions LayerQuantizer::Rounding() const {
  const QuantizeSettings& settings = options_.settings;
  GptqOptions options = {.compensate = settings.gptq,
                         .damping = settings.damp,
                         .order = settings.gptq_order,
                         .search_groups = settings.clip_search,
                         .refinements = static_cast<int>(settings.refinements)};
  if (!settings.clip_search) options.row_clips = {1.0f};
  return options;
}

absl::StatusOr<std::vector<BF16>> LayerQuantizer::RotatedRows(std::vector<BF16> values,
                                                              std::span<const BF16> column_scale) const {
  if (rotation_ == nullptr) return values;
  // So many rows at a time that the f32 copies stay small beside the table.
  const size_t h = static_cast<size_t>(config_.hidden_size), rows = std::max<size_t>(h, 4096);
  std::vector<float> chunk;
  for (size_t begin = 0; begin < values.size(); begin += rows * h) {
    const std::span<BF16> part = std::span(values).subspan(begin, std::min(rows * h, values.size() - begin));
    chunk.resize(part.size());
    for (size_t i = 0; i < part.size(); ++i)
      chunk[i] = ToFloat(part[i]) * (column_scale.empty() ? 1.0f : ToFloat(column_scale[i % h]));
    rotation_->ApplyToRows(chunk, &pool_);
    std::transform(chunk.begin(), chunk.end(), part.begin(), [](float x) { return ToBF16(x); });
  }
  return values;
}

absl::StatusOr<std::vector<BF16>> LayerQuantizer::Embedding() const {
  const int64_t shape[] = {config_.vocab_size, config_.hidden_size};
  NIBBLE_ASSIGN_OR_RETURN(std::vector<BF16> table, source_.Dense("model.embed_tokens.weight", shape));
  return RotatedRows(std::move(table), {});
}

absl::StatusOr<std::vector<BF16>> LayerQuantizer::Head() const {
  NIBBLE_ASSIGN_OR_RETURN(LinearTensors head, source_.Linear("lm_head", ShardAxis::kNone, 0, 1));
  const int64_t shape[] = {config_.hidden_size};
  NIBBLE_ASSIGN_OR_RETURN(const std::vector<BF16> norm, source_.Dense("model.norm.weight", shape));
  return RotatedRows(std::move(head.dense), norm);
}

absl::StatusOr<std::vector<BF16>> LayerQuantizer::FinalNorm() const {
  const int64_t shape[] = {config_.hidden_size};
  if (rotation_ != nullptr) return std::vector<BF16>(static_cast<size_t>(shape[0]), ToBF16(1.0f));
  return source_.Dense("model.norm.weight", shape);
}

std::vector<std::string> LayerQuantizer::Transforms() const {
  const QuantizeSettings& settings = options_.settings;
  std::vector<std::string> names;
  if (RotatesResidual()) {
    names.emplace_back("fold_norms");
    names.emplace_back(NeedsSurvey() ? "rotate_residual_principal" : "rotate_residual_hadamard");
  }
  if (settings.rotate_heads) names.emplace_back("rotate_heads");
  if (settings.smooth_attention > 0) names.emplace_back("smooth_attention");
  if (settings.smooth_output > 0) names.emplace_back("smooth_output");
  if (settings.sort_neurons) names.emplace_back("sort_neurons");
  if (settings.rotate_down) names.emplace_back("rotate_down");
  if (settings.permute != ChannelOrder::kOff) names.emplace_back("channel_permutation");
  return names;
}

int64_t LayerQuantizer::PredictedPeakBytes() const {
  const int64_t h = config_.hidden_size, f = config_.intermediate_size, q = config_.num_heads * config_.head_dim;
  const int64_t hidden = static_cast<int64_t>(windows_.size()) * window_tokens_ * h * 4;
  int64_t weights = 0, largest = 0, moments = 0;
  for (size_t i = 0; i < kLayerLinears; ++i) {
    const LinearShape shape = DecoderLinears(config_)[i];
    weights += shape.n * shape.k;
    largest = std::max(largest, shape.n * shape.k);
  }
  const int64_t widest = std::max({h, q, f});
  for (const int64_t k : {h, q, h, f}) moments += k * k * (options_.settings.coded_inputs ? 8 : 4);
  const int64_t activations = runner_->rows_per_run() * (3 * h + 3 * q + 2 * f + 4 * widest) * 4;
  // f32 weights and as many bytes packed for the forward pass, one linear copied or rounded; the factor of the widest
  // input: two panels in f32 and the factorization in f64.
  const int64_t layer = 8 * weights + 8 * largest + moments + widest * widest * 16;
  const int64_t tables = config_.vocab_size * h * 2;
  return std::max(tables, layer + activations) + hidden * (options_.settings.quantized_flow ? 2 : 1);
}

}  // namespace nibble
