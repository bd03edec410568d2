// From token ids to the client's stream: text, stop strings, deltas, backpressure.
//
//   scheduler thread ── events ──► output thread (one per stream, always the same) ── messages ──► writer (gRPC)
//
// A stream writes one message at a time. What comes while a write is on its way is merged into the next one, so a slow
// client gets fewer and larger messages; one that stops reading loses its request, and nobody else notices.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <grpcpp/alarm.h>

#include "absl/status/status.h"
#include "common/text/detokenizer.h"
#include "common/text/stop_matcher.h"
#include "common/text/tokenizer.h"
#include "nibble/v1/inference.pb.h"
#include "router/request_metrics.h"
#include "router/sequence.h"

namespace nibble {

inline constexpr uint32_t kMaxSequencesPerRequest = 8;

// Where a stream writes. Write is called again only after the stream was told OnWriteDone; after Finish or WriteAndFinish
// nothing is called any more, and the writer may be gone.
class StreamWriter {
 public:
  virtual ~StreamWriter() = default;
  virtual void Write(const v1::GenerateResponse& response) = 0;  // stays as it is until OnWriteDone
  virtual void WriteAndFinish(const v1::GenerateResponse& response) = 0;
  virtual void Finish(const absl::Status& status) = 0;
  // Breaks the call off: a write that does not move completes with ok = false. Must not call back from inside.
  virtual void Cancel() = 0;
};

struct OutputOptions {
  std::string request_id;
  uint32_t n = 1;
  uint32_t min_tokens = 0;                  // stop strings are off up to here
  std::vector<std::string> stop;
  bool include_stop_str = false;
  bool skip_special_tokens = true;
  bool prompt_logprobs = false;
  uint32_t num_prompt_tokens = 0;           // for usage
  uint32_t max_tokens = 0;                  // for metrics
  uint32_t max_buffered_tokens = 4096;      // of a client that does not read; more ends the request
  std::chrono::milliseconds stall_timeout{60000};  // how long the end of a stream waits for its client
  TimePoint arrived_at{};
};

class OutputStream : public std::enable_shared_from_this<OutputStream> {
 public:
  // `cancel` frees a sequence wherever it is; called without locks, from any thread. `writer` lives until Finish.
  OutputStream(StreamWriter* writer, const Tokenizer* tokenizer, RequestMetrics* metrics, uint64_t first_sequence_id,
               std::function<void(uint64_t sequence_id)> cancel);

  // Before the first event, once the request is known to be good.
  void Configure(OutputOptions options);

  // Sequence i of the request has id first_sequence_id() + i; a multiple of kMaxSequencesPerRequest.
  uint64_t first_sequence_id() const { return first_sequence_id_; }
  // Whether nobody wants this sequence's tokens any more. Set before `cancel` is called.
  bool cancelled(uint32_t index) const { return (cancelled_.load(std::memory_order_acquire) >> index & 1) != 0; }

  // The stream's output thread. Call Advance when a batch of events is through.
  void Consume(SequenceEvent event);
  // Writes or finishes if there is something to write or finish, and nothing on its way. Any thread.
  void Advance();

  // The writer's reactions.
  void OnWriteDone(bool ok);
  void OnCancel();                          // the client left, or its deadline passed

  // The writer was told to finish: events are of no use any more.
  bool over();

  // Ends the request with an error, after what was already produced. The first one counts. Any thread.
  void Fail(const absl::Status& status) { End(status, false); }

 private:
  struct SequenceText {
    Detokenizer detokenizer;
    StopMatcher stops;
    uint32_t tokens = 0;
    bool done = false;
    bool prompt_scored = false;             // the empty entry of the first prompt token is out
    TimePoint first_token_at{}, last_token_at{};
  };

  // The delta of one event; sets response->finish when the sequence ends with it.
  void Render(SequenceEvent* event, SequenceText* text, v1::GenerateResponse* delta);
  void Observe(const SequenceEvent& event, const v1::GenerateResponse& delta, SequenceText* text);
  void End(const absl::Status& status, bool drop_pending);
  void CancelSequences();
  void WatchStalledWrite();

  RequestMetrics* const metrics_;
  const Tokenizer* const tokenizer_;
  const uint64_t first_sequence_id_;
  const std::function<void(uint64_t)> cancel_;
  std::atomic<uint32_t> cancelled_ = 0;     // bit per sequence

  OutputOptions options_;                   // fixed by Configure
  std::vector<SequenceText> texts_;         // output thread only

  std::mutex mutex_;                        // below
  StreamWriter* writer_;                    // null once finished
  bool writing_ = false;
  v1::GenerateResponse written_;            // gRPC's while writing_
  std::vector<v1::GenerateResponse> pending_;  // per sequence
  uint32_t pending_messages_ = 0;           // non-empty entries of pending_
  uint32_t next_pending_ = 0;               // whose turn it is
  uint64_t pending_tokens_ = 0;
  uint32_t unfinished_ = 1;
  bool configured_ = false;
  bool watched_ = false;
  absl::Status status_;                     // not OK: the request ends with it
  grpc::Alarm stall_alarm_;
};

// True when the sequence's client no longer wants it.
bool SequenceCancelled(const Sequence& sequence);

}  // namespace nibble
