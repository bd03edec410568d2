#include "worker/model/runner.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

// Rows whose logits are computed at a time: bounds their memory (a row of a large vocabulary takes half a megabyte).
constexpr int64_t kLogitRows = 256;

constexpr int64_t kMaxSequences = 65536;
constexpr int64_t kMaxStepTokens = 1 << 20;

uint32_t Microseconds(std::chrono::nanoseconds duration) {
  return static_cast<uint32_t>(std::chrono::duration_cast<std::chrono::microseconds>(duration).count());
}

absl::Status CheckRange(const char* field, int64_t value, int64_t max) {
  if (value >= 1 && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, ", must be in 1..", max));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<const Model> model,
                                                     std::shared_ptr<Communicator> communicator,
                                                     const EngineLimits& limits) {
  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Runner> runner,
                          Runner::Create(std::move(model), std::move(communicator), limits));
  return runner;
}

absl::StatusOr<std::unique_ptr<Runner>> Runner::Create(std::shared_ptr<const Model> model,
                                                       std::shared_ptr<Communicator> communicator,
                                                       const EngineLimits& limits) {
  NIBBLE_CHECK(model != nullptr && communicator != nullptr);
  NIBBLE_CHECK_EQ(communicator->rank(), model->rank);
  NIBBLE_CHECK_EQ(communicator->size(), model->world_size);
  NIBBLE_RETURN_IF_ERROR(CheckRange("max_sequences", limits.max_sequences, kMaxSequences));
  NIBBLE_RETURN_IF_ERROR(CheckRange("max_step_tokens", limits.max_step_tokens, kMaxStepTokens));
  NIBBLE_RETURN_IF_ERROR(CheckRange("kv_memory_bytes", limits.kv_memory_bytes, int64_t{1} << 50));
  NIBBLE_ASSIGN_OR_RETURN(
      KvPool pool, KvPool::Create(*model->ops, model->kv_layout(), model->config.num_layers, limits.kv_memory_bytes));
  const SlotLimits slot_limits = {.max_sequences = limits.max_sequences,
                                  .max_step_tokens = limits.max_step_tokens,
                                  .max_context_tokens = model->config.max_position_embeddings,
                                  .num_pages = pool.num_pages(),
                                  .vocab_size = model->config.vocab_size};
  auto runner = std::unique_ptr<Runner>(
      new Runner(std::move(model), std::move(communicator), std::move(pool), limits, slot_limits));
  NIBBLE_RETURN_IF_ERROR(runner->Allocate());
  runner->Reset();
  return runner;
}

Runner::Runner(std::shared_ptr<const Model> model, std::shared_ptr<Communicator> communicator, KvPool pool,
               const EngineLimits& limits, const SlotLimits& slot_limits)
    : model_(std::move(model)),
      ops_(*model_->ops),
      communicator_(std::move(communicator)),
      limits_(limits),
      pool_(std::move(pool)),
      slots_(slot_limits) {}

absl::Status Runner::Allocate() {
  const int64_t t = limits_.max_step_tokens, slots = limits_.max_sequences;
  const int64_t logit_rows = std::min(t, kLogitRows);
  NIBBLE_ASSIGN_OR_RETURN(llama_, Llama::Create(*model_, *communicator_, pool_, {.rows = t, .logit_rows = logit_rows}));

  const int64_t context = model_->config.max_position_embeddings;
  const int64_t sequences = std::min(t, slots);
  const int64_t context_pages = (context + kPageTokens - 1) / kPageTokens;
  const int64_t inputs = 4 * t + sequences + 1 + sequences * context_pages;  // see UploadBatch
  staging_.reserve(static_cast<size_t>(inputs));
  sample_rows_.reserve(static_cast<size_t>(logit_rows));
  const struct {
    Buffer* buffer;
    int64_t count;
    size_t size;
  } buffers[] = {
      {&inputs_, inputs, sizeof(int32_t)},
      {&slot_tokens_, slots, sizeof(int32_t)},
      {&history_, slots * model_->config.vocab_size, sizeof(uint16_t)},
      {&known_tokens_, context, sizeof(int32_t)},
      {&bias_ids_, slots * kMaxBiasedIds, sizeof(int32_t)},
      {&bias_values_, slots * kMaxBiasedIds, sizeof(float)},
      {&suppressed_ids_, slots * kMaxSuppressedIds, sizeof(int32_t)},
      {&sample_params_, logit_rows, sizeof(SampleRow)},
      {&token_ids_, logit_rows, sizeof(int32_t)},
      {&logprobs_, logit_rows, sizeof(float)},
      {&top_ids_, logit_rows * kMaxTopLogprobs, sizeof(int32_t)},
      {&top_logprobs_, logit_rows * kMaxTopLogprobs, sizeof(float)},
  };
  for (const auto& [buffer, count, size] : buffers) {
    NIBBLE_ASSIGN_OR_RETURN(*buffer, ops_.Allocate(static_cast<size_t>(count) * size));
  }
  return absl::OkStatus();
}

void Runner::Reset() {
  slots_.Reset();
  failed_ = absl::OkStatus();
#if !defined(NDEBUG) || defined(__SANITIZE_ADDRESS__)
  pool_.Poison(ops_);
#endif
}

absl::Status Runner::Execute(const v1::StepPlan& plan, v1::StepResult* result) {
  result->Clear();
  if (!failed_.ok()) return Annotate(failed_, "the engine needs a Reset since");
  failed_ = Step(plan, result);
  return failed_;
}

absl::Status Runner::Step(const v1::StepPlan& plan, v1::StepResult* result) {
  const Clock::time_point start = Clock::now();
  NIBBLE_RETURN_IF_ERROR(slots_.Apply(plan, &batch_));
  UploadStarted();
  if (batch_.rows() > 0) {
    NIBBLE_RETURN_IF_ERROR(llama_->Forward(UploadBatch()));
    const int64_t logit_rows = static_cast<int64_t>(batch_.logit_rows.size());
    for (int64_t begin = 0; begin < logit_rows; begin += kLogitRows) {
      NIBBLE_RETURN_IF_ERROR(SampleRows(begin, std::min(kLogitRows, logit_rows - begin), result));
    }
  }
  NIBBLE_RETURN_IF_ERROR(ops_.Synchronize());
  result->set_step(plan.step());
  result->set_forward_us(Microseconds(Clock::now() - start));
  result->set_collective_us(Microseconds(llama_->TakeCollectiveTime()));
  result->set_sample_us(Microseconds(std::exchange(sample_time_, {})));
  return absl::OkStatus();
}

void Runner::UploadStarted() {
  for (const int32_t index : batch_.started) {
    const Slot& slot = slots_.slot(index);
    const SamplingParams& sampling = slot.sampling;
    const auto upload = [&](const Buffer& to, int64_t stride, const auto& values) {
      using T = typename std::decay_t<decltype(values)>::value_type;
      if (!values.empty()) ops_.Upload(to.as<T>() + index * stride, values.data(), values.size() * sizeof(T));
    };
    upload(bias_ids_, kMaxBiasedIds, sampling.bias_ids);
    upload(bias_values_, kMaxBiasedIds, sampling.bias_values);
    upload(suppressed_ids_, kMaxSuppressedIds, sampling.suppressed_ids);
    if (!sampling.penalized) continue;
    const int64_t vocab = model_->config.vocab_size;
    ops_.Upload(known_tokens_.data(), slot.token_ids.data(), slot.token_ids.size() * sizeof(int32_t));
    ops_.RecordHistory({.history = history_.as<uint16_t>() + index * vocab,
                        .vocab = vocab,
                        .token_ids = known_tokens_.as<int32_t>(),
                        .count = static_cast<int64_t>(slot.token_ids.size()),
                        .num_prompt = slot.num_prompt_tokens});
  }
}

Llama::Input Runner::UploadBatch() {
  staging_.clear();
  const int32_t* device = inputs_.as<int32_t>();
  const auto stage = [&](const std::vector<int32_t>& values) {
    const int32_t* at = device + staging_.size();
    staging_.insert(staging_.end(), values.begin(), values.end());
    return at;
  };
  Llama::Input input;
  input.token_ids = stage(batch_.token_ids);
  input.slot_tokens = slot_tokens_.as<int32_t>();
  input.step = {.rows = batch_.rows(),
                .sequences = batch_.sequences(),
                .positions = stage(batch_.positions),
                .row_sequence = stage(batch_.row_sequence),
                .row_begin = stage(batch_.row_begin),
                .page_tables = stage(batch_.page_tables),
                .max_pages = batch_.max_pages};
  logit_row_index_ = device + staging_.size();
  for (const LogitRow& row : batch_.logit_rows) staging_.push_back(row.row);
  NIBBLE_CHECK_LE(staging_.size() * sizeof(int32_t), inputs_.bytes());
  ops_.Upload(inputs_.data(), staging_.data(), staging_.size() * sizeof(int32_t));
  return input;
}

absl::Status Runner::SampleRows(int64_t begin, int64_t count, v1::StepResult* result) {
  NIBBLE_ASSIGN_OR_RETURN(const float* logits, llama_->Logits(logit_row_index_ + begin, count));
  const Clock::time_point start = Clock::now();
  sample_rows_.clear();
  for (int64_t i = 0; i < count; ++i) sample_rows_.push_back(batch_.logit_rows[static_cast<size_t>(begin + i)].sample);
  ops_.Upload(sample_params_.data(), sample_rows_.data(), sample_rows_.size() * sizeof(SampleRow));
  // Every rank samples: the logits are the same bits everywhere, and each rank's next step needs the token.
  ops_.Sample({.logits = logits,
               .rows = count,
               .vocab = model_->config.vocab_size,
               .params = sample_params_.as<SampleRow>(),
               .bias_ids = bias_ids_.as<int32_t>(),
               .bias_values = bias_values_.as<float>(),
               .suppress_ids = suppressed_ids_.as<int32_t>(),
               .history = history_.as<uint16_t>(),
               .slot_tokens = slot_tokens_.as<int32_t>(),
               .token_ids = token_ids_.as<int32_t>(),
               .logprobs = logprobs_.as<float>(),
               .top_ids = top_ids_.as<int32_t>(),
               .top_logprobs = top_logprobs_.as<float>()});
  if (model_->rank == 0) ReportRows(begin, count, result);
  sample_time_ += Clock::now() - start;
  return absl::OkStatus();
}

void Runner::ReportRows(int64_t begin, int64_t count, v1::StepResult* result) {
  const std::span<const LogitRow> rows(batch_.logit_rows.data() + begin, static_cast<size_t>(count));
  const auto download = [&]<typename T>(std::vector<T>& to, const Buffer& from, int64_t per_row, bool wanted) {
    if (!wanted) return;
    to.resize(static_cast<size_t>(count * per_row));
    ops_.Download(to.data(), from.data(), to.size() * sizeof(T));
  };
  const bool any_logprobs =
      std::any_of(rows.begin(), rows.end(), [](const LogitRow& r) { return r.sample.num_logprobs >= 0; });
  const bool any_top =
      std::any_of(rows.begin(), rows.end(), [](const LogitRow& r) { return r.sample.num_logprobs > 0; });
  std::vector<int32_t> token_ids, top_ids;
  std::vector<float> logprobs, top_logprobs;
  download(token_ids, token_ids_, 1, true);
  download(logprobs, logprobs_, 1, any_logprobs);
  download(top_ids, top_ids_, kMaxTopLogprobs, any_top);
  download(top_logprobs, top_logprobs_, kMaxTopLogprobs, any_top);

  for (size_t i = 0; i < rows.size(); ++i) {
    const LogitRow& row = rows[i];
    const int32_t token = row.prompt ? row.sample.target : token_ids[i];
    if (!row.prompt) result->add_token_ids(static_cast<uint32_t>(token));
    if (row.sample.num_logprobs < 0) continue;
    v1::RowLogprobs* out = row.prompt ? result->add_prompt_logprobs() : result->add_logprobs();
    out->set_slot(static_cast<uint32_t>(row.slot));
    out->set_token_id(static_cast<uint32_t>(token));
    out->set_logprob(logprobs[i]);
    for (int32_t k = 0; k < row.sample.num_logprobs; ++k) {
      const size_t at = i * kMaxTopLogprobs + static_cast<size_t>(k);
      out->add_top_ids(static_cast<uint32_t>(top_ids[at]));
      out->add_top_logprobs(top_logprobs[at]);
    }
  }
}

}  // namespace nibble
