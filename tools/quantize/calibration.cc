#include "tools/quantize/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/tokenizer.h"
#include "kernels/ops.h"
#include "nibble/v1/worker.pb.h"
#include "tools/quantize/observing_ops.h"
#include "worker/comm/communicator.h"
#include "worker/model/engine.h"
#include "worker/model/weights.h"

namespace nibble {
namespace {

constexpr int64_t kWindowsPerStep = 4;

// Sums over all rows seen; the reference model's activations are f32 in host memory.
class StatisticsObserver : public OpsObserver {
 public:
  StatisticsObserver(const Model& model, int64_t total_rows, int64_t sample_rows)
      : layers_(model.layers.size()),
        sums_(model.layers.size()),
        stride_(std::max<int64_t>(1, total_rows / sample_rows)) {
    for (size_t i = 0; i < model.layers.size(); ++i) {
      const LayerWeights& w = model.layers[i];
      places_[w.qkv.weight.get()] = {i, LayerInput::kQkv};
      places_[w.o.weight.get()] = {i, LayerInput::kO};
      places_[w.gate_up.weight.get()] = {i, LayerInput::kGateUp};
      places_[w.down.weight.get()] = {i, LayerInput::kDown};
      layers_[i].key_max.assign(static_cast<size_t>(model.config.num_kv_heads * model.config.head_dim), 0.0f);
    }
  }

  void AfterLinear(const LinearArgs& args) override {
    const auto it = places_.find(args.weight);
    if (it == places_.end()) return;  // lm_head is not quantized
    const auto [layer, which] = it->second;
    layer_ = layer;
    AddInput(args.input.dense, layer, which);
    if (which == LayerInput::kO || which == LayerInput::kDown) AddDelta(args.out, which);
  }

  void AfterAddNormQuantize(const AddNormQuantizeArgs& args) override {
    residual_energy_.assign(static_cast<size_t>(args.residual.rows), 0.0);
    for (int64_t t = 0; t < args.residual.rows; ++t)
      residual_energy_[static_cast<size_t>(t)] = RowEnergy(args.residual, t);
  }

  void AfterRopeAppend(const RopeAppendArgs& args) override {
    const KvLayout& layout = args.pages.layout;
    NIBBLE_CHECK(layout.format == KvFormat::kF32);
    std::vector<float>& key_max = layers_[layer_].key_max;  // the qkv linear of this layer came just before
    for (int64_t t = 0; t < args.step.rows; ++t) {
      const int64_t position = args.step.positions[t];
      const int64_t page =
          args.step.page_tables[args.step.row_sequence[t] * args.step.max_pages + position / kPageTokens];
      for (int64_t head = 0; head < layout.kv_heads; ++head) {
        const uint8_t* base = args.pages.data + page * layout.page_bytes() + head * layout.head_bytes();
        const float* key = reinterpret_cast<const float*>(base) + position % kPageTokens * layout.head_dim;
        float* max = key_max.data() + head * layout.head_dim;
        for (int64_t d = 0; d < layout.head_dim; ++d) max[d] = std::max(max[d], std::fabs(key[d]));
      }
    }
  }

  std::vector<LayerStatistics> Take() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (size_t j = 0; j < kLayerInputs; ++j) {
        const Sums& sums = sums_[i][j];
        InputStatistics& input = layers_[i].inputs[j];
        for (const double square : sums.square)
          input.mean_square.push_back(static_cast<float>(square / static_cast<double>(sums.rows)));
      }
      const Sums& o = sums_[i][static_cast<size_t>(LayerInput::kO)];
      const Sums& down = sums_[i][static_cast<size_t>(LayerInput::kDown)];
      layers_[i].attention_share = o.delta_share / static_cast<double>(o.rows);
      layers_[i].mlp_share = down.delta_share / static_cast<double>(down.rows);
    }
    return std::move(layers_);
  }

 private:
  struct Place {
    size_t layer;
    LayerInput input;
  };
  struct Sums {
    std::vector<double> square;  // [K]
    int64_t rows = 0;
    double delta_share = 0;
  };

  static const float* Row(const Rows& rows, int64_t t) {
    NIBBLE_CHECK(rows.dtype == DType::kF32);
    return static_cast<const float*>(rows.data) + t * rows.cols;
  }
  static double RowEnergy(const Rows& rows, int64_t t) {
    const float* x = Row(rows, t);
    double sum = 0;
    for (int64_t c = 0; c < rows.cols; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    return sum;
  }

  void AddInput(const Rows& rows, size_t layer, LayerInput which) {
    Sums& sums = sums_[layer][static_cast<size_t>(which)];
    InputStatistics& input = layers_[layer].input(which);
    input.k = rows.cols;
    sums.square.resize(static_cast<size_t>(rows.cols), 0.0);
    for (int64_t t = 0; t < rows.rows; ++t) {
      const float* x = Row(rows, t);
      for (int64_t c = 0; c < rows.cols; ++c)
        sums.square[static_cast<size_t>(c)] += static_cast<double>(x[c]) * static_cast<double>(x[c]);
      if (sums.rows++ % stride_ == 0) input.samples.insert(input.samples.end(), x, x + rows.cols);
    }
  }

  void AddDelta(const Rows& delta, LayerInput which) {
    Sums& sums = sums_[layer_][static_cast<size_t>(which)];
    for (int64_t t = 0; t < delta.rows; ++t) {
      const double energy = RowEnergy(delta, t), total = energy + residual_energy_[static_cast<size_t>(t)];
      if (total > 0) sums.delta_share += energy / total;
    }
  }

  std::map<const Weight*, Place> places_;
  std::vector<LayerStatistics> layers_;
  std::vector<std::array<Sums, kLayerInputs>> sums_;
  const int64_t stride_;
  size_t layer_ = 0;                     // of the linear that ran last
  std::vector<double> residual_energy_;  // [T] of the current step, before the coming delta
};

// Prefills windows [begin, end) in one plan, without sampling.
v1::StepPlan PlanWindows(std::span<const std::vector<uint32_t>> windows, int64_t pages_per_window) {
  v1::StepPlan plan;
  uint32_t page = 0;
  for (uint32_t slot = 0; slot < windows.size(); ++slot) {
    v1::StartSequence* start = plan.add_start();
    start->set_slot(slot);
    start->mutable_token_ids()->Add(windows[slot].begin(), windows[slot].end());
    start->set_num_prompt_tokens(static_cast<uint32_t>(windows[slot].size()));
    for (int64_t p = 0; p < pages_per_window; ++p) start->add_page_ids(page++);
    start->mutable_sampling()->set_top_p(1);
    start->mutable_sampling()->set_repetition_penalty(1);
    v1::PrefillChunk* chunk = plan.add_prefill();
    chunk->set_slot(slot);
    chunk->set_num_tokens(static_cast<uint32_t>(windows[slot].size() - 1));  // the last known token is never computed
  }
  return plan;
}

}  // namespace

absl::StatusOr<std::vector<std::vector<uint32_t>>> CalibrationWindows(const std::string& tokenizer_dir,
                                                                      const std::string& text_path, int64_t vocab_size,
                                                                      const CalibrationOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(tokenizer_dir));
  NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(text_path, Tokenizer::kMaxTextBytes));
  absl::StatusOr<std::vector<uint32_t>> ids =
      tokenizer->Encode(text, {.add_special_tokens = false, .parse_special_tokens = false});
  if (!ids.ok()) return Annotate(ids.status(), text_path);
  const int64_t tokens = static_cast<int64_t>(ids->size());
  const auto unknown = std::find_if(ids->begin(), ids->end(), [&](uint32_t id) { return id >= vocab_size; });
  if (unknown != ids->end()) {
    return absl::InvalidArgumentError(absl::StrCat(tokenizer_dir, "/tokenizer.json: gives token id ", *unknown,
                                                   ", the model's vocabulary has ", vocab_size));
  }

  const auto bos = tokenizer->bos_id();
  const bool with_bos = bos.has_value() && *bos < vocab_size;
  const int64_t taken = options.window_tokens - (with_bos ? 1 : 0);
  if (tokens < options.min_windows * taken) {
    return absl::InvalidArgumentError(
        absl::StrCat(text_path, ": has ", tokens, " tokens, calibration needs at least ", options.min_windows * taken));
  }
  const int64_t windows = std::min(options.windows, tokens / taken);
  std::vector<std::vector<uint32_t>> out;
  for (int64_t i = 0; i < windows; ++i) {
    const auto begin = ids->begin() + static_cast<ptrdiff_t>((tokens / windows) * i);
    std::vector<uint32_t> window;
    if (with_bos) window.push_back(*bos);
    window.insert(window.end(), begin, begin + static_cast<ptrdiff_t>(taken));
    out.push_back(std::move(window));
  }
  return out;
}

absl::StatusOr<std::vector<LayerStatistics>> Calibrate(const Checkpoint& checkpoint,
                                                       std::span<const std::vector<uint32_t>> windows,
                                                       const CalibrationOptions& options,
                                                       const std::function<absl::Status(int64_t)>& progress) {
  const ModelConfig& config = checkpoint.config();
  NIBBLE_CHECK(config.quantization == Quantization::kBF16);
  NIBBLE_CHECK(!windows.empty());
  const int64_t length = static_cast<int64_t>(windows.front().size());
  for (const auto& window : windows) NIBBLE_CHECK_EQ(static_cast<int64_t>(window.size()), length);
  if (length > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "calibration windows have ", length, " tokens, the model's context has ", config.max_position_embeddings));
  }

  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Ops> backend, CreateOps({.backend = "cpu", .threads = options.threads}));
  const auto ops = std::make_shared<ObservingOps>(std::move(backend), nullptr);
  NIBBLE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model,
                          LoadModel(checkpoint, ops, /*rank=*/0, /*world_size=*/1));
  NIBBLE_ASSIGN_OR_RETURN(const auto pending, PrepareCommunicator({.rank = 0, .size = 1}));
  const std::string endpoints[] = {pending->endpoint()};
  NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<Communicator> communicator, pending->Connect(endpoints));

  const int64_t pages = (length + kPageTokens - 1) / kPageTokens;
  const EngineLimits limits = {
      .kv_memory_bytes = kWindowsPerStep * pages * model->kv_layout().page_bytes() * config.num_layers,
      .max_sequences = kWindowsPerStep,
      .max_step_tokens = kWindowsPerStep * length};
  NIBBLE_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, CreateEngine(model, std::move(communicator), limits));

  StatisticsObserver observer(*model, static_cast<int64_t>(windows.size()) * (length - 1), options.sample_rows);
  ops->SetObserver(&observer);
  for (size_t begin = 0; begin < windows.size(); begin += kWindowsPerStep) {
    const size_t count = std::min<size_t>(kWindowsPerStep, windows.size() - begin);
    engine->Reset();
    v1::StepPlan plan = PlanWindows(windows.subspan(begin, count), pages);
    plan.set_step(1);
    v1::StepResult result;
    NIBBLE_RETURN_IF_ERROR(engine->Execute(plan, &result));
    NIBBLE_RETURN_IF_ERROR(progress(static_cast<int64_t>(begin + count)));
  }
  ops->SetObserver(nullptr);
  return observer.Take();
}

}  // namespace nibble
