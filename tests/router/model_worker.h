// A worker that computes nothing and notices everything: the model of a worker that router tests run plans against.
//
// It keeps, for every slot of every KV page, which prefix was written there (a hash of all tokens up to that position),
// and executes a plan as worker.proto describes it: all appends of a step first, then every row's attention, which
// must find exactly its own sequence's prefix at every position it reads. A page that was handed out too early, freed
// too early, matched wrongly or overwritten shows up as a wrong hash. Its tokens are a function of (all tokens so far,
// position, sampling), so what a sequence generates can be computed without a scheduler: ReferenceOutput.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nibble/v1/worker.pb.h"
#include "router/sequence.h"

namespace nibble::testing {

inline constexpr uint32_t kVocabSize = 24;  // small, so that stop ids are hit and outputs collide

struct Reference {
  std::vector<uint32_t> output;
  v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED;
};
// What `sequence` generates from its prompt when nothing disturbs it.
Reference ReferenceOutput(const Sequence& sequence);

class ModelWorker {
 public:
  struct Limits {
    uint32_t num_pages = 0;
    uint32_t page_tokens = 64;
    uint32_t max_sequences = 0;
    uint32_t max_step_tokens = 0;
  };
  explicit ModelWorker(const Limits& limits);

  // INTERNAL, with what is wrong, for a plan that breaks a rule of worker.proto or reads what it must not.
  absl::Status Execute(const v1::StepPlan& plan, v1::StepResult* result);

  // Distinct pages in the tables of live slots.
  uint32_t num_held_pages() const;
  uint32_t num_live_slots() const { return static_cast<uint32_t>(slots_.size()); }

 private:
  struct Slot {
    std::vector<uint32_t> tokens;  // known, sampled ones included
    std::vector<uint64_t> prefix;  // prefix[i] = hash of tokens[0..i]
    std::vector<uint32_t> pages;
    uint32_t num_prompt_tokens = 0;
    uint32_t computed = 0;
    bool decoding = false;  // the newest token was sampled here
    v1::StepSampling sampling;
  };
  struct Row {
    uint32_t slot;
    uint32_t position;
    bool sample;
  };

  absl::Status ApplyTables(const v1::StepPlan& plan);
  absl::Status CollectRows(const v1::StepPlan& plan, std::vector<Row>* rows);
  absl::Status Append(const std::vector<Row>& rows);
  absl::Status Attend(const std::vector<Row>& rows) const;
  void Sample(const std::vector<Row>& rows, v1::StepResult* result);

  Limits limits_;
  uint64_t step_ = 0;
  std::map<uint32_t, Slot> slots_;
  std::vector<uint64_t> contents_;  // [num_pages, page_tokens]
};

}  // namespace nibble::testing
