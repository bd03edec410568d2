// The sequences of a replica as one rank knows them, and what a plan makes of them: the rows of the step. Host
// arithmetic only. Plans come from the network, so every field is checked before it is used.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "kernels/ops.h"
#include "nibble/v1/worker.pb.h"
#include "worker/model/sampling_params.h"

namespace nibble {

struct SlotLimits {
  int64_t max_sequences = 0;       // slots
  int64_t max_step_tokens = 0;     // rows of one plan
  int64_t max_context_tokens = 0;  // positions
  int64_t num_pages = 0;
  int64_t vocab_size = 0;
};

struct Slot {
  std::vector<int32_t> token_ids;  // the known tokens: prompt, and what an earlier life of the sequence generated
  std::vector<int32_t> pages;
  int64_t num_prompt_tokens = 0;
  int64_t cached_tokens = 0;  // leading positions whose keys and values are in the pages
  int64_t length_tokens = 0;  // known tokens and those sampled since; the newest may be known to the device only
  SamplingParams sampling;
};

// One row whose logits the step needs.
struct LogitRow {
  int32_t row = 0;  // of the step
  int32_t slot = 0;
  bool prompt = false;  // scores a prompt token instead of sampling
  SampleRow sample;
};

// The rows of a step, as StepRows wants them, still on the host.
struct StepBatch {
  std::vector<int32_t> token_ids;     // [T]; ~slot for the newest token of a decoding slot
  std::vector<int32_t> positions;     // [T]
  std::vector<int32_t> row_sequence;  // [T]
  std::vector<int32_t> row_begin;     // [S+1]
  std::vector<int32_t> page_tables;   // [S, max_pages], -1 past a sequence's pages
  int64_t max_pages = 0;
  std::vector<LogitRow> logit_rows;  // rising row
  std::vector<int32_t> started;      // slots that began with this plan

  int64_t rows() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t sequences() const { return static_cast<int64_t>(row_begin.size()) - 1; }
};

class SlotTable {
 public:
  explicit SlotTable(const SlotLimits& limits);

  void Reset();

  // Applies a plan in worker.proto's order and lays out its rows. INVALID_ARGUMENT with field, value and limit; the
  // table is then in no defined state but for Reset.
  absl::Status Apply(const v1::StepPlan& plan, StepBatch* batch);

  const Slot& slot(int32_t index) const { return *slots_[static_cast<size_t>(index)]; }

 private:
  absl::Status Release(const v1::StepPlan& plan);
  absl::Status Start(const v1::StepPlan& plan, StepBatch* batch);
  absl::Status AppendPages(const v1::StepPlan& plan);
  absl::Status AddPrefill(const v1::StepPlan& plan, int index, StepBatch* batch);
  absl::Status AddDecode(const v1::StepPlan& plan, int index, StepBatch* batch);
  // Rows [first position, first position + count) of a slot; ids come from the caller.
  absl::Status AddSequence(const std::string& field, int32_t slot_index, int64_t count, StepBatch* batch);
  void AddSampling(int32_t slot_index, StepBatch* batch);

  absl::StatusOr<Slot*> Find(const std::string& field, uint32_t index);
  absl::Status CheckPages(const std::string& field, const google::protobuf::RepeatedField<uint32_t>& ids,
                          int64_t held) const;

  const SlotLimits limits_;
  const int64_t max_pages_;  // of one sequence
  std::vector<std::optional<Slot>> slots_;
  std::vector<bool> scheduled_;  // slots with rows in the plan being applied
  uint64_t last_step_ = 0;
};

}  // namespace nibble
