#include "router/output.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nibble {
namespace {

void CopyLogprobs(v1::RowLogprobs* row, v1::TokenLogprobs* out) {
  out->set_token_id(row->token_id());
  out->set_logprob(row->logprob());
  out->mutable_top_ids()->Swap(row->mutable_top_ids());
  out->mutable_top_logprobs()->Swap(row->mutable_top_logprobs());
}

template <typename Repeated>
void MoveAppend(Repeated* from, Repeated* to) {
  if (to->empty()) {
    to->Swap(from);
  } else {
    to->MergeFrom(*from);
  }
}

// `later` of the same sequence behind `earlier`.
void Append(v1::GenerateResponse* later, v1::GenerateResponse* earlier) {
  earlier->mutable_text()->append(later->text());
  MoveAppend(later->mutable_token_ids(), earlier->mutable_token_ids());
  MoveAppend(later->mutable_logprobs(), earlier->mutable_logprobs());
  MoveAppend(later->mutable_prompt_logprobs(), earlier->mutable_prompt_logprobs());
  if (later->has_finish()) earlier->mutable_finish()->Swap(later->mutable_finish());
}

bool Empty(const v1::GenerateResponse& r) {
  return r.text().empty() && r.token_ids().empty() && r.prompt_logprobs().empty() && !r.has_finish();
}

}  // namespace

bool SequenceCancelled(const Sequence& sequence) {
  return sequence.output != nullptr && sequence.output->cancelled(sequence.index);
}

OutputStream::OutputStream(StreamWriter* writer, const Tokenizer* tokenizer, RequestMetrics* metrics,
                           uint64_t first_sequence_id, std::function<void(uint64_t)> cancel)
    : metrics_(metrics),
      tokenizer_(tokenizer),
      first_sequence_id_(first_sequence_id),
      cancel_(std::move(cancel)),
      writer_(writer) {}

void OutputStream::Configure(OutputOptions options) {
  std::lock_guard<std::mutex> lock(mutex_);
  options_ = std::move(options);
  for (uint32_t i = 0; i < options_.n; ++i) {
    texts_.push_back({.detokenizer = Detokenizer(tokenizer_, {.skip_special_tokens = options_.skip_special_tokens}),
                      .stops = StopMatcher(options_.stop, options_.include_stop_str)});
  }
  pending_.resize(options_.n);
  unfinished_ = options_.n;
  configured_ = true;
}

void OutputStream::Consume(SequenceEvent event) {
  const auto index = static_cast<uint32_t>(event.sequence_id - first_sequence_id_);
  SequenceText& text = texts_[index];
  if (text.done || cancelled(index)) return;
  if (!event.status.ok()) {
    End(event.status, false);
    return;
  }
  v1::GenerateResponse delta;
  delta.set_index(index);
  Render(&event, &text, &delta);
  Observe(event, delta, &text);
  const bool finished = delta.has_finish();
  // A stop string is found here, after the fact: the scheduler is told to stop. It knows about its own endings.
  const bool stopped_here = finished && !event.finish.has_value();
  bool too_slow = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!status_.ok()) return;
    pending_tokens_ += static_cast<uint64_t>(delta.token_ids_size());
    v1::GenerateResponse& pending = pending_[index];
    if (!Empty(delta)) {
      if (Empty(pending)) {
        ++pending_messages_;
        pending.Swap(&delta);
      } else {
        Append(&delta, &pending);
      }
    }
    if (finished) --unfinished_;
    too_slow = pending_tokens_ > options_.max_buffered_tokens;
  }
  text.done = finished;
  if (stopped_here) {
    cancelled_.fetch_or(1u << index, std::memory_order_acq_rel);
    cancel_(event.sequence_id);
  }
  if (too_slow) {
    End(absl::ResourceExhaustedError(absl::StrCat("the client reads too slowly: more than ",
                                                  options_.max_buffered_tokens,
                                                  " tokens wait for it (max-buffered-tokens)")),
        true);
  }
}

void OutputStream::Render(SequenceEvent* event, SequenceText* text, v1::GenerateResponse* delta) {
  if (options_.prompt_logprobs && !text->prompt_scored) {
    text->prompt_scored = true;
    delta->add_prompt_logprobs();  // nothing predicts the first token
  }
  if (event->scores != nullptr) {
    for (v1::RowLogprobs& row : event->scores->prompt_logprobs) CopyLogprobs(&row, delta->add_prompt_logprobs());
    if (event->scores->logprobs.has_value()) CopyLogprobs(&*event->scores->logprobs, delta->add_logprobs());
  }

  std::optional<size_t> matched;
  if (event->token_id.has_value()) {
    ++text->tokens;
    delta->add_token_ids(*event->token_id);
    // The token that ended the sequence has a text only when the client asked to see what stopped it.
    const bool silent = event->finish == v1::FINISH_REASON_STOP && !options_.include_stop_str;
    const std::string_view piece = silent ? std::string_view() : text->detokenizer.Append(*event->token_id);
    if (text->tokens > options_.min_tokens) {
      StopMatcher::Step step = text->stops.Append(piece);
      delta->set_text(std::move(step.text));
      matched = step.matched;
    } else {
      delta->set_text(std::string(piece));
    }
  }
  if (event->finish.has_value() && !matched.has_value()) {
    StopMatcher::Step step = text->stops.Append(text->detokenizer.Finish());
    delta->mutable_text()->append(step.text);
    matched = step.matched;
    if (!matched.has_value()) delta->mutable_text()->append(text->stops.Flush());
  }

  if (matched.has_value() || event->finish.has_value()) {
    v1::Finish* finish = delta->mutable_finish();
    if (matched.has_value()) {
      finish->set_finish_reason(v1::FINISH_REASON_STOP);
      finish->set_matched_stop_str(options_.stop[*matched]);
    } else {
      finish->set_finish_reason(*event->finish);
      if (*event->finish == v1::FINISH_REASON_STOP) finish->set_matched_token_id(*event->token_id);
    }
    v1::Usage* usage = finish->mutable_usage();
    usage->set_prompt_tokens(options_.num_prompt_tokens);
    usage->set_completion_tokens(text->tokens);
    usage->set_cached_tokens(event->cached_tokens);
    usage->set_preemptions(event->preemptions);
  }
}

void OutputStream::Observe(const SequenceEvent& event, const v1::GenerateResponse& delta, SequenceText* text) {
  const TimePoint now = event.at;
  if (event.token_id.has_value()) {
    if (text->tokens == 1) {
      text->first_token_at = now;
      metrics_->ObserveFirstToken(now - options_.arrived_at);
    } else {
      metrics_->ObserveToken(now - text->last_token_at);
    }
    text->last_token_at = now;
  }
  if (!delta.has_finish()) return;
  metrics_->ObserveFinished({.arrived_at = options_.arrived_at,
                             .first_scheduled_at = event.first_scheduled_at,
                             .first_token_at = text->first_token_at,
                             .finished_at = now,
                             .n = options_.n,
                             .max_tokens = options_.max_tokens},
                            delta.finish());
}

bool OutputStream::over() {
  std::lock_guard<std::mutex> lock(mutex_);
  return writer_ == nullptr;
}

void OutputStream::Advance() {
  StreamWriter* writer = nullptr;
  bool write = false, finish = false, watched = false;
  absl::Status status;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (writing_ || writer_ == nullptr) return;
    if (pending_messages_ > 0) {
      while (Empty(pending_[next_pending_])) next_pending_ = (next_pending_ + 1) % options_.n;
      written_.Clear();
      written_.Swap(&pending_[next_pending_]);
      written_.set_request_id(options_.request_id);
      written_.set_index(next_pending_);
      next_pending_ = (next_pending_ + 1) % options_.n;
      --pending_messages_;
      pending_tokens_ -= static_cast<uint64_t>(written_.token_ids_size());
      write = writing_ = true;
    }
    finish = pending_messages_ == 0 && ((configured_ && unfinished_ == 0 && status_.ok()) || (!write && !status_.ok()));
    if (!write && !finish) return;
    status = status_;
    writer = writer_;
    if (finish) writer_ = nullptr;
    watched = watched_;
  }
  // Without the lock: gRPC may run the reaction before the call returns. The writer cannot be gone: it lives until it is
  // told to finish, and only the thread that got through the checks above may tell it.
  if (write && finish) {
    writer->WriteAndFinish(written_);
  } else if (write) {
    writer->Write(written_);
  } else {
    writer->Finish(status);
  }
  if (finish && watched) stall_alarm_.Cancel();
  WatchStalledWrite();
}

void OutputStream::OnWriteDone(bool ok) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
  }
  if (!ok) {
    OnCancel();
    return;
  }
  Advance();
}

void OutputStream::OnCancel() { End(absl::CancelledError("the client cancelled the call or its deadline passed"), true); }

void OutputStream::End(const absl::Status& status, bool drop_pending) {
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool over = configured_ && unfinished_ == 0;  // every sequence has its finish: only the writing is left
    if (status_.ok() && (!over || drop_pending)) {
      status_ = status;
      first = !over;
    }
    if (drop_pending) {
      for (auto& pending : pending_) pending.Clear();
      pending_messages_ = 0;
      pending_tokens_ = 0;
    }
  }
  if (first) {
    CancelSequences();
    metrics_->CountFailed(status.code());
  }
  Advance();
  WatchStalledWrite();
}

void OutputStream::CancelSequences() {
  uint32_t n = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    n = configured_ ? options_.n : 0;
  }
  cancelled_.store(~0u, std::memory_order_release);
  for (uint32_t i = 0; i < n; ++i) cancel_(first_sequence_id_ + i);
}

// Once a stream is over, its last write may take stall_timeout and no longer. Until then max_buffered_tokens is the bound.
void OutputStream::WatchStalledWrite() {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool over = !status_.ok() || (configured_ && unfinished_ == 0);
  if (!over || watched_ || writer_ == nullptr || !writing_) return;
  watched_ = true;
  stall_alarm_.Set(std::chrono::system_clock::now() + options_.stall_timeout,
                   [self = shared_from_this()](bool expired) mutable {
                     // The alarm keeps this function until it is destroyed itself, and it is a member of what self keeps.
                     const std::shared_ptr<OutputStream> stream = std::move(self);
                     if (!expired) return;
                     std::lock_guard<std::mutex> stream_lock(stream->mutex_);
                     // Under the lock, so that the writer is still there; Cancel does not call back from inside.
                     if (stream->writer_ != nullptr) stream->writer_->Cancel();
                   });
}

}  // namespace nibble
