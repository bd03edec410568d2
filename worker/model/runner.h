// The Engine: turns plans into rows (SlotTable), rows into logits (Llama), logits into tokens (Ops::Sample).
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "worker/model/engine.h"
#include "worker/model/kv_pool.h"
#include "worker/model/llama.h"
#include "worker/model/slot_table.h"
#include "worker/model/weights.h"

namespace nibble {

class Runner : public Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Runner>> Create(std::shared_ptr<const Model> model,
                                                        std::shared_ptr<Communicator> communicator,
                                                        const EngineLimits& limits);

  int64_t num_pages() const override { return pool_.num_pages(); }
  int64_t kv_page_bytes() const override { return pool_.page_bytes(); }
  void Reset() override;
  absl::Status Execute(const v1::StepPlan& plan, v1::StepResult* result) override;

 private:
  Runner(std::shared_ptr<const Model> model, std::shared_ptr<Communicator> communicator, KvPool pool,
         const EngineLimits& limits, const SlotLimits& slot_limits);
  absl::Status Allocate();
  absl::Status Step(const v1::StepPlan& plan, v1::StepResult* result);
  // Sampling state of the sequences that begin with this plan.
  void UploadStarted();
  // One upload for everything the step's operators read; returns it as they want it.
  Llama::Input UploadBatch();
  // Logits and tokens of logit rows [begin, begin + count).
  absl::Status SampleRows(int64_t begin, int64_t count, v1::StepResult* result);
  void ReportRows(int64_t begin, int64_t count, v1::StepResult* result);

  const std::shared_ptr<const Model> model_;
  Ops& ops_;
  const std::shared_ptr<Communicator> communicator_;
  const EngineLimits limits_;
  KvPool pool_;
  std::unique_ptr<Llama> llama_;
  SlotTable slots_;
  StepBatch batch_;
  std::vector<int32_t> staging_;  // host image of inputs_
  std::vector<SampleRow> sample_rows_;
  std::chrono::nanoseconds sample_time_{};
  absl::Status failed_;  // the first error since Reset

  // Device memory, all of it allocated once.
  Buffer inputs_;                             // int32: the step's rows, see UploadBatch
  Buffer slot_tokens_;                        // int32 [slots]: newest token of each slot
  Buffer history_;                            // u16 [slots, V]
  Buffer known_tokens_;                       // int32 [max context]: what RecordHistory counts
  Buffer bias_ids_;                           // int32 [slots, kMaxBiasedIds]
  Buffer bias_values_;                        // f32, as bias_ids_
  Buffer suppressed_ids_;                     // int32 [slots, kMaxSuppressedIds]
  Buffer sample_params_;                      // SampleRow [logit rows]
  Buffer token_ids_;                          // int32 [logit rows]
  Buffer logprobs_;                           // f32 [logit rows]
  Buffer top_ids_;                            // int32 [logit rows, 20]
  Buffer top_logprobs_;                       // f32 [logit rows, 20]
  const int32_t* logit_row_index_ = nullptr;  // in inputs_
};

}  // namespace nibble
