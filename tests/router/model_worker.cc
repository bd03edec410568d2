#include "tests/router/model_worker.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nibble::testing {
namespace {

uint64_t Mix(uint64_t a, uint64_t b) {  // splitmix64 of a combination
  uint64_t x = a * 0x9e3779b97f4a7c15u + b + 0x632be59bd9b4e019u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint32_t NextToken(uint64_t prefix, uint32_t position, uint32_t num_outputs, const v1::StepSampling& sampling) {
  uint32_t token = static_cast<uint32_t>(Mix(Mix(prefix, position), sampling.seed()) % kVocabSize);
  const auto& suppressed = sampling.suppressed_ids();
  while (num_outputs < sampling.min_tokens() &&
         std::find(suppressed.begin(), suppressed.end(), token) != suppressed.end()) {
    token = (token + 1) % kVocabSize;
  }
  return token;
}

template <typename... Parts>
absl::Status Broken(const Parts&... parts) {
  return absl::InternalError(absl::StrCat(parts...));
}

}  // namespace

Reference ReferenceOutput(const Sequence& sequence) {
  Reference reference;
  uint64_t prefix = 0;
  uint32_t position = 0;
  for (; position < sequence.num_prompt_tokens; ++position) prefix = Mix(prefix, sequence.token_ids[position]);
  for (;; ++position) {
    const uint32_t num_outputs = static_cast<uint32_t>(reference.output.size());
    const uint32_t token = NextToken(prefix, position, num_outputs, sequence.sampling);
    reference.output.push_back(token);
    prefix = Mix(prefix, token);
    const auto& stops = sequence.stop_ids;
    if (num_outputs >= sequence.min_tokens && std::find(stops.begin(), stops.end(), token) != stops.end()) {
      reference.finish = v1::FINISH_REASON_STOP;
      return reference;
    }
    if (num_outputs + 1 == sequence.max_tokens) {
      reference.finish = v1::FINISH_REASON_LENGTH;
      return reference;
    }
  }
}

ModelWorker::ModelWorker(const Limits& limits)
    : limits_(limits), contents_(size_t{limits.num_pages} * limits.page_tokens, 0) {}

uint32_t ModelWorker::num_held_pages() const {
  std::set<uint32_t> held;
  for (const auto& [id, slot] : slots_) held.insert(slot.pages.begin(), slot.pages.end());
  return static_cast<uint32_t>(held.size());
}

absl::Status ModelWorker::Execute(const v1::StepPlan& plan, v1::StepResult* result) {
  if (plan.step() != ++step_) return Broken("step ", plan.step(), " after step ", step_ - 1);
  if (absl::Status status = ApplyTables(plan); !status.ok()) return status;
  std::vector<Row> rows;
  if (absl::Status status = CollectRows(plan, &rows); !status.ok()) return status;
  if (absl::Status status = Append(rows); !status.ok()) return status;
  if (absl::Status status = Attend(rows); !status.ok()) return status;
  result->set_step(plan.step());
  Sample(rows, result);
  return absl::OkStatus();
}

absl::Status ModelWorker::ApplyTables(const v1::StepPlan& plan) {
  for (const uint32_t slot : plan.release_slots()) {
    if (slots_.erase(slot) == 0) return Broken("release of free slot ", slot);
  }
  for (const v1::StartSequence& start : plan.start()) {
    if (start.slot() >= limits_.max_sequences) return Broken("slot ", start.slot(), " out of range");
    const auto [it, is_new] = slots_.try_emplace(start.slot());
    if (!is_new) return Broken("start in slot ", start.slot(), ", which is in use");
    Slot& slot = it->second;
    slot.tokens.assign(start.token_ids().begin(), start.token_ids().end());
    for (const uint32_t token : slot.tokens) {
      if (token >= kVocabSize) return Broken("token ", token, " outside the vocabulary");
      slot.prefix.push_back(Mix(slot.prefix.empty() ? 0 : slot.prefix.back(), token));
    }
    slot.pages.assign(start.page_ids().begin(), start.page_ids().end());
    slot.num_prompt_tokens = start.num_prompt_tokens();
    slot.computed = start.num_cached_tokens();
    slot.sampling = start.sampling();
    if (slot.num_prompt_tokens == 0 || slot.num_prompt_tokens > slot.tokens.size()) return Broken("num_prompt_tokens");
    if (slot.computed % limits_.page_tokens != 0) return Broken("num_cached_tokens is not a multiple of the page size");
    if (slot.computed >= slot.tokens.size()) return Broken("nothing left to compute");
    if (slot.computed > slot.pages.size() * limits_.page_tokens) return Broken("cached tokens without pages");
  }
  if (plan.page_slots_size() != plan.page_ids_size()) return Broken("page_slots and page_ids differ in length");
  for (int i = 0; i < plan.page_slots_size(); ++i) {
    const auto it = slots_.find(plan.page_slots(i));
    if (it == slots_.end()) return Broken("page for free slot ", plan.page_slots(i));
    it->second.pages.push_back(plan.page_ids(i));
  }
  for (const auto& [id, slot] : slots_) {
    std::set<uint32_t> pages(slot.pages.begin(), slot.pages.end());
    if (pages.size() != slot.pages.size()) return Broken("slot ", id, " holds a page twice");
    if (!pages.empty() && *pages.rbegin() >= limits_.num_pages) return Broken("page id out of range in slot ", id);
  }
  return absl::OkStatus();
}

absl::Status ModelWorker::CollectRows(const v1::StepPlan& plan, std::vector<Row>* rows) {
  std::set<uint32_t> seen;
  const auto find = [&](uint32_t id) { return seen.insert(id).second ? slots_.find(id) : slots_.end(); };
  for (const v1::PrefillChunk& chunk : plan.prefill()) {
    const auto it = find(chunk.slot());
    if (it == slots_.end()) return Broken("prefill in slot ", chunk.slot(), ", free or named twice");
    Slot& slot = it->second;
    const uint32_t end = slot.computed + chunk.num_tokens();
    if (slot.decoding) return Broken("prefill in slot ", chunk.slot(), ", which is decoding");
    if (chunk.num_tokens() == 0 || end > slot.tokens.size()) return Broken("chunk of ", chunk.num_tokens(), " tokens");
    if (chunk.sample() != (end == slot.tokens.size()))
      return Broken("sample is ", chunk.sample(), " in ", chunk.slot());
    while (slot.computed < end) {
      rows->push_back({chunk.slot(), slot.computed, slot.computed + 1 == end && chunk.sample()});
      ++slot.computed;
    }
  }
  for (const uint32_t id : plan.decode_slots()) {
    const auto it = find(id);
    if (it == slots_.end()) return Broken("decode in slot ", id, ", free or named twice");
    Slot& slot = it->second;
    if (!slot.decoding || slot.computed + 1 != slot.tokens.size())
      return Broken("decode in slot ", id, " has no token");
    rows->push_back({id, slot.computed++, true});
  }
  if (rows->empty()) return Broken("a plan without rows");
  if (rows->size() > limits_.max_step_tokens) return Broken(rows->size(), " rows, limit ", limits_.max_step_tokens);
  return absl::OkStatus();
}

absl::Status ModelWorker::Append(const std::vector<Row>& rows) {
  std::set<std::pair<uint32_t, uint32_t>> written;
  for (const Row& row : rows) {
    const Slot& slot = slots_.at(row.slot);
    const uint32_t index = row.position / limits_.page_tokens, offset = row.position % limits_.page_tokens;
    if (index >= slot.pages.size()) return Broken("no page for position ", row.position, " of slot ", row.slot);
    if (!written.insert({slot.pages[index], offset}).second) {
      return Broken("two rows of one step write page ", slot.pages[index], " at ", offset);
    }
    contents_[size_t{slot.pages[index]} * limits_.page_tokens + offset] = slot.prefix[row.position];
  }
  return absl::OkStatus();
}

absl::Status ModelWorker::Attend(const std::vector<Row>& rows) const {
  for (const Row& row : rows) {
    const Slot& slot = slots_.at(row.slot);
    for (uint32_t position = 0; position <= row.position; ++position) {
      const uint32_t page = slot.pages[position / limits_.page_tokens];
      const uint64_t read = contents_[size_t{page} * limits_.page_tokens + position % limits_.page_tokens];
      if (read != slot.prefix[position]) {
        return Broken("slot ", row.slot, ": the row of position ", row.position, " reads a foreign key at position ",
                      position, " (page ", page, ")");
      }
    }
  }
  return absl::OkStatus();
}

void ModelWorker::Sample(const std::vector<Row>& rows, v1::StepResult* result) {
  for (const Row& row : rows) {
    Slot& slot = slots_.at(row.slot);
    if (slot.sampling.prompt_logprobs() && row.position + 1 < slot.num_prompt_tokens) {
      v1::RowLogprobs* score = result->add_prompt_logprobs();
      score->set_slot(row.slot);
      score->set_token_id(slot.tokens[row.position + 1]);
      score->set_logprob(-static_cast<float>(row.position + 1));
    }
    if (!row.sample) continue;
    const uint32_t num_outputs = row.position + 1 - slot.num_prompt_tokens;
    const uint32_t token = NextToken(slot.prefix[row.position], row.position + 1, num_outputs, slot.sampling);
    slot.tokens.push_back(token);
    slot.prefix.push_back(Mix(slot.prefix.back(), token));
    slot.decoding = true;
    result->add_token_ids(token);
    if (slot.sampling.logprobs()) {
      v1::RowLogprobs* logprobs = result->add_logprobs();
      logprobs->set_slot(row.slot);
      logprobs->set_token_id(token);
      logprobs->set_logprob(-static_cast<float>(row.position + 1));
    }
  }
}

}  // namespace nibble::testing
