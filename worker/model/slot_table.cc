#include "worker/model/slot_table.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace nibble {
namespace {

template <typename... Args>
absl::Status Bad(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

std::string Element(const char* field, int index) { return absl::StrCat(field, "[", index, "]"); }

int64_t PagesFor(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

}  // namespace

SlotTable::SlotTable(const SlotLimits& limits)
    : limits_(limits),
      max_pages_(PagesFor(limits.max_context_tokens)),
      slots_(limits.max_sequences),
      scheduled_(limits.max_sequences) {}

void SlotTable::Reset() {
  std::fill(slots_.begin(), slots_.end(), std::nullopt);
  last_step_ = 0;
}

absl::Status SlotTable::Apply(const v1::StepPlan& plan, StepBatch* batch) {
  if (plan.step() == 0) return Bad("step is 0, steps count from 1");
  if (last_step_ != 0 && plan.step() != last_step_ + 1)
    return Bad("step is ", plan.step(), ", must follow ", last_step_);
  last_step_ = plan.step();

  batch->token_ids.clear();
  batch->positions.clear();
  batch->row_sequence.clear();
  batch->row_begin.assign(1, 0);
  batch->page_tables.clear();
  batch->logit_rows.clear();
  batch->started.clear();
  std::fill(scheduled_.begin(), scheduled_.end(), false);

  NIBBLE_RETURN_IF_ERROR(Release(plan));
  NIBBLE_RETURN_IF_ERROR(Start(plan, batch));
  NIBBLE_RETURN_IF_ERROR(AppendPages(plan));

  // Width of the step's page tables, known before the first row is laid out.
  batch->max_pages = 1;
  const auto widen = [&](uint32_t slot) {
    if (slot < slots_.size() && slots_[slot]) {
      batch->max_pages = std::max<int64_t>(batch->max_pages, static_cast<int64_t>(slots_[slot]->pages.size()));
    }
  };
  for (const v1::PrefillChunk& chunk : plan.prefill()) widen(chunk.slot());
  for (const uint32_t slot : plan.decode_slots()) widen(slot);

  for (int i = 0; i < plan.prefill_size(); ++i) NIBBLE_RETURN_IF_ERROR(AddPrefill(plan, i, batch));
  for (int i = 0; i < plan.decode_slots_size(); ++i) NIBBLE_RETURN_IF_ERROR(AddDecode(plan, i, batch));
  return absl::OkStatus();
}

absl::Status SlotTable::Release(const v1::StepPlan& plan) {
  for (int i = 0; i < plan.release_slots_size(); ++i) {
    const uint32_t index = plan.release_slots(i);
    NIBBLE_RETURN_IF_ERROR(Find(Element("release_slots", i), index).status());
    slots_[index].reset();
  }
  return absl::OkStatus();
}

absl::Status SlotTable::Start(const v1::StepPlan& plan, StepBatch* batch) {
  for (int i = 0; i < plan.start_size(); ++i) {
    const v1::StartSequence& start = plan.start(i);
    const std::string at = absl::StrCat("start[", i, "].");
    if (start.slot() >= slots_.size())
      return Bad(at, "slot is ", start.slot(), ", there are ", slots_.size(), " slots");
    if (slots_[start.slot()]) return Bad(at, "slot is ", start.slot(), ", which is in use");
    const int64_t count = start.token_ids_size();
    if (count == 0) return Bad(at, "token_ids is empty");
    if (count > limits_.max_context_tokens) {
      return Bad(at, "token_ids has ", count, " entries, the model's context has ", limits_.max_context_tokens);
    }
    for (int64_t t = 0; t < count; ++t) {
      if (start.token_ids(static_cast<int>(t)) >= limits_.vocab_size) {
        return Bad(at, "token_ids[", t, "] is ", start.token_ids(static_cast<int>(t)), ", the vocabulary has ",
                   limits_.vocab_size, " tokens");
      }
    }
    if (start.num_prompt_tokens() > count) {
      return Bad(at, "num_prompt_tokens is ", start.num_prompt_tokens(), ", token_ids has ", count, " entries");
    }
    NIBBLE_RETURN_IF_ERROR(CheckPages(at + "page_ids", start.page_ids(), /*held=*/0));
    const int64_t cached = start.num_cached_tokens();
    if (cached % kPageTokens != 0)
      return Bad(at, "num_cached_tokens is ", cached, ", must be a multiple of ", kPageTokens);
    if (cached >= count)
      return Bad(at, "num_cached_tokens is ", cached, ", at least one of ", count, " tokens must be left to compute");
    if (cached > start.page_ids_size() * kPageTokens) {
      return Bad(at, "num_cached_tokens is ", cached, ", page_ids hold ", start.page_ids_size() * kPageTokens);
    }
    if (!start.has_sampling()) return Bad(at, "sampling is missing");
    NIBBLE_ASSIGN_OR_RETURN(SamplingParams sampling,
                            ParseSampling(start.sampling(), limits_.vocab_size, at + "sampling."));

    Slot slot;
    slot.token_ids.assign(start.token_ids().begin(), start.token_ids().end());
    slot.pages.assign(start.page_ids().begin(), start.page_ids().end());
    slot.num_prompt_tokens = start.num_prompt_tokens();
    slot.cached_tokens = cached;
    slot.length_tokens = count;
    slot.sampling = std::move(sampling);
    slots_[start.slot()] = std::move(slot);
    batch->started.push_back(static_cast<int32_t>(start.slot()));
  }
  return absl::OkStatus();
}

absl::Status SlotTable::AppendPages(const v1::StepPlan& plan) {
  if (plan.page_slots_size() != plan.page_ids_size()) {
    return Bad("page_slots has ", plan.page_slots_size(), " entries, page_ids has ", plan.page_ids_size());
  }
  for (int i = 0; i < plan.page_slots_size(); ++i) {
    NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Find(Element("page_slots", i), plan.page_slots(i)));
    if (plan.page_ids(i) >= limits_.num_pages) {
      return Bad(Element("page_ids", i), " is ", plan.page_ids(i), ", the pool has ", limits_.num_pages, " pages");
    }
    if (static_cast<int64_t>(slot->pages.size()) >= max_pages_) {
      return Bad(Element("page_slots", i), ": slot ", plan.page_slots(i), " already holds the ", max_pages_,
                 " pages of a full context");
    }
    slot->pages.push_back(static_cast<int32_t>(plan.page_ids(i)));
  }
  return absl::OkStatus();
}

absl::Status SlotTable::AddPrefill(const v1::StepPlan& plan, int index, StepBatch* batch) {
  const v1::PrefillChunk& chunk = plan.prefill(index);
  const std::string at = absl::StrCat("prefill[", index, "].");
  NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Find(at + "slot", chunk.slot()));
  const int64_t first = slot->cached_tokens, known = static_cast<int64_t>(slot->token_ids.size());
  const int64_t left = known - first, count = chunk.num_tokens();
  if (count < 1 || count > left) {
    return Bad(at, "num_tokens is ", count, ", slot ", chunk.slot(), " has ", left, " known tokens left to compute");
  }
  if (chunk.sample() && count != left) {
    return Bad(at, "sample is set, but the chunk ends ", left - count, " tokens before the last known one");
  }
  const int32_t slot_index = static_cast<int32_t>(chunk.slot());
  const int32_t begin = static_cast<int32_t>(batch->rows());
  NIBBLE_RETURN_IF_ERROR(AddSequence(at + "slot", slot_index, count, batch));
  batch->token_ids.insert(batch->token_ids.end(), slot->token_ids.begin() + first,
                          slot->token_ids.begin() + first + count);

  // A prompt position is scored by the row before it. Tokens after the prompt were scored when they were sampled.
  if (slot->sampling.prompt_logprobs) {
    for (int64_t p = first; p < first + count && p + 1 < slot->num_prompt_tokens; ++p) {
      LogitRow row{.row = begin + static_cast<int32_t>(p - first), .slot = slot_index, .prompt = true};
      row.sample.target = slot->token_ids[static_cast<size_t>(p + 1)];
      row.sample.num_logprobs = slot->sampling.num_top_prompt_logprobs;
      batch->logit_rows.push_back(row);
    }
  }
  if (chunk.sample()) AddSampling(slot_index, batch);
  return absl::OkStatus();
}

absl::Status SlotTable::AddDecode(const v1::StepPlan& plan, int index, StepBatch* batch) {
  const std::string at = Element("decode_slots", index);
  NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Find(at, plan.decode_slots(index)));
  if (slot->length_tokens == static_cast<int64_t>(slot->token_ids.size())) {
    return Bad(at, " is ", plan.decode_slots(index), ", whose prefill has not sampled a token yet");
  }
  const int32_t slot_index = static_cast<int32_t>(plan.decode_slots(index));
  NIBBLE_RETURN_IF_ERROR(AddSequence(at, slot_index, 1, batch));
  batch->token_ids.push_back(~slot_index);
  AddSampling(slot_index, batch);
  return absl::OkStatus();
}

absl::Status SlotTable::AddSequence(const std::string& field, int32_t slot_index, int64_t count, StepBatch* batch) {
  Slot& slot = *slots_[static_cast<size_t>(slot_index)];
  if (scheduled_[static_cast<size_t>(slot_index)])
    return Bad(field, " is ", slot_index, ", which has rows in this plan already");
  scheduled_[static_cast<size_t>(slot_index)] = true;
  const int64_t rows = batch->rows() + count;
  if (rows > limits_.max_step_tokens) {
    return Bad(field, ": the plan has at least ", rows, " rows, max_step_tokens is ", limits_.max_step_tokens);
  }
  const int64_t end = slot.cached_tokens + count;
  if (end > limits_.max_context_tokens) {
    return Bad(field, " is ", slot_index, ", whose next row would be at position ", end - 1,
               ", the model's context has ", limits_.max_context_tokens);
  }
  if (end > static_cast<int64_t>(slot.pages.size()) * kPageTokens) {
    return Bad(field, " is ", slot_index, ", whose ", slot.pages.size(), " pages hold fewer than the ", end,
               " tokens it would have");
  }
  const int32_t sequence = static_cast<int32_t>(batch->sequences());
  for (int64_t p = slot.cached_tokens; p < end; ++p) {
    batch->positions.push_back(static_cast<int32_t>(p));
    batch->row_sequence.push_back(sequence);
  }
  batch->row_begin.push_back(static_cast<int32_t>(rows));
  batch->page_tables.insert(batch->page_tables.end(), slot.pages.begin(), slot.pages.end());
  batch->page_tables.resize(static_cast<size_t>((sequence + 1) * batch->max_pages), -1);
  slot.cached_tokens = end;
  return absl::OkStatus();
}

void SlotTable::AddSampling(int32_t slot_index, StepBatch* batch) {
  Slot& slot = *slots_[static_cast<size_t>(slot_index)];
  LogitRow row{.row = static_cast<int32_t>(batch->rows()) - 1, .slot = slot_index, .sample = slot.sampling.row};
  row.sample.position = static_cast<int32_t>(slot.length_tokens);
  row.sample.slot = slot_index;
  row.sample.history = slot.sampling.penalized ? slot_index : -1;
  row.sample.bias_begin = slot_index * static_cast<int32_t>(kMaxBiasedIds);
  row.sample.bias_end = row.sample.bias_begin + static_cast<int32_t>(slot.sampling.bias_ids.size());
  const bool suppress = slot.length_tokens - slot.num_prompt_tokens < slot.sampling.min_tokens;
  row.sample.suppress_begin = slot_index * static_cast<int32_t>(kMaxSuppressedIds);
  row.sample.suppress_end =
      row.sample.suppress_begin + (suppress ? static_cast<int32_t>(slot.sampling.suppressed_ids.size()) : 0);
  batch->logit_rows.push_back(row);
  ++slot.length_tokens;
}

absl::StatusOr<Slot*> SlotTable::Find(const std::string& field, uint32_t index) {
  if (index >= slots_.size()) return Bad(field, " is ", index, ", there are ", slots_.size(), " slots");
  if (!slots_[index]) return Bad(field, " is ", index, ", which holds no sequence");
  return &*slots_[index];
}

absl::Status SlotTable::CheckPages(const std::string& field, const google::protobuf::RepeatedField<uint32_t>& ids,
                                   int64_t held) const {
  if (held + ids.size() > max_pages_)
    return Bad(field, " has ", ids.size(), " entries, a full context has ", max_pages_, " pages");
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= limits_.num_pages)
      return Bad(field, "[", i, "] is ", ids[i], ", the pool has ", limits_.num_pages, " pages");
  }
  return absl::OkStatus();
}

}  // namespace nibble
