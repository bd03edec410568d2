#include "tools/bench/load.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nibble/v1/inference.grpc.pb.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

class Stream;

// Owns the streams in flight. Streams report from gRPC's threads; the sending thread waits here.
class Flight {
 public:
  explicit Flight(Progress* progress) : progress_(progress) {}

  // Waits until `time`, and then for a free place; false when the run was cancelled.
  bool WaitForTurn(Clock::time_point time, int64_t max_concurrency) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_until(lock, time, [this] { return cancelled_; });
    changed_.wait(lock, [&] {
      return cancelled_ || max_concurrency == 0 || static_cast<int64_t>(streams_.size()) < max_concurrency;
    });
    return !cancelled_;
  }

  void WaitForAll() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return streams_.empty(); });
  }

  Stream* Add(std::shared_ptr<Stream> stream);
  void Remove(Stream* stream);
  void CancelAll();

  bool cancelled() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return cancelled_;
  }

 private:
  Progress* const progress_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<Stream*, std::shared_ptr<Stream>> streams_;
  bool cancelled_ = false;
};

// One Generate call. After Start only gRPC's callbacks, one at a time, touch it and its record.
class Stream : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Stream(Flight* flight, v1::GenerateRequest request, Clock::time_point run_start, double timeout_s,
         RequestRecord* record)
      : flight_(flight), request_(std::move(request)), run_start_(run_start), record_(record) {
    if (timeout_s > 0) {
      context_.set_deadline(std::chrono::system_clock::now() +
                            std::chrono::microseconds(static_cast<int64_t>(timeout_s * 1e6)));
    }
  }

  void Start(v1::Inference::Stub* stub) {
    sent_ = Clock::now();
    record_->sent = true;
    record_->sent_s = Seconds(sent_ - run_start_);
    stub->async()->Generate(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;  // OnDone follows
    if (!response_.token_ids().empty()) {
      record_->latency_s = Seconds(Clock::now() - sent_);
      record_->chunks.push_back(
          {static_cast<float>(record_->latency_s), static_cast<uint32_t>(response_.token_ids_size())});
      record_->output_tokens += static_cast<uint32_t>(response_.token_ids_size());
    }
    if (response_.has_finish()) {
      finished_ = true;
      record_->input_tokens = response_.finish().usage().prompt_tokens();
      record_->cached_tokens = response_.finish().usage().cached_tokens();
      record_->preemptions = response_.finish().usage().preemptions();
    }
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    if (!status.ok()) {
      record_->code = status.error_code();
      record_->error = FormatRpcError(ReadRpcError(status));
    } else if (!finished_) {
      record_->code = grpc::StatusCode::INTERNAL;
      record_->error =
          absl::StrCat("INTERNAL: the stream ended after ", record_->output_tokens, " tokens without finish");
    }
    if (!record_->ok() || record_->chunks.empty()) record_->latency_s = Seconds(Clock::now() - sent_);
    flight_->Remove(this);  // deletes this
  }

 private:
  Flight* const flight_;
  const v1::GenerateRequest request_;
  const Clock::time_point run_start_;
  RequestRecord* const record_;
  grpc::ClientContext context_;
  v1::GenerateResponse response_;
  Clock::time_point sent_;
  bool finished_ = false;
};

Stream* Flight::Add(std::shared_ptr<Stream> stream) {
  Stream* const pointer = stream.get();
  const std::lock_guard<std::mutex> lock(mutex_);
  streams_.emplace(pointer, std::move(stream));
  return pointer;
}

void Flight::Remove(Stream* stream) {
  // The bar is drawn before the lock: WaitForAll's caller may end the run, and the bar, as soon as the set is empty.
  if (progress_ != nullptr) progress_->Add(1);
  std::shared_ptr<Stream> owned;
  const std::lock_guard<std::mutex> lock(mutex_);
  owned = std::move(streams_.extract(stream).mapped());
  changed_.notify_all();  // under the lock: the Flight may go away right after it
}

void Flight::CancelAll() {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
    for (const auto& [pointer, stream] : streams_) streams.push_back(stream);
    changed_.notify_all();
  }
  for (const auto& stream : streams) stream->Cancel();  // without the lock: gRPC may call back from inside
}

}  // namespace

LoadResult RunLoad(const std::vector<std::shared_ptr<grpc::Channel>>& channels, const Workload& workload,
                   const LoadOptions& options, Progress* progress, Interrupt* interrupt) {
  std::vector<std::unique_ptr<v1::Inference::Stub>> stubs;
  for (const auto& channel : channels) stubs.push_back(v1::Inference::NewStub(channel));

  LoadResult result;
  result.records.resize(static_cast<size_t>(options.num_requests));
  Flight flight(progress);
  std::optional<Interrupt::Scope> cancel_on_signal;
  if (interrupt != nullptr) cancel_on_signal.emplace(interrupt, [&flight] { flight.CancelAll(); });

  const Clock::time_point start = Clock::now();
  for (int64_t i = 0; i < options.num_requests; ++i) {
    v1::GenerateRequest request = workload.Request(options.first_index + i);  // made before it is due
    const double due_s = options.at_once ? 0 : workload.arrivals_s()[static_cast<size_t>(options.first_index + i)];
    const auto due = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(due_s));
    if (!flight.WaitForTurn(due, options.max_concurrency)) break;
    Stream* const stream = flight.Add(std::make_shared<Stream>(
        &flight, std::move(request), start, options.request_timeout_s, &result.records[static_cast<size_t>(i)]));
    stream->Start(stubs[static_cast<size_t>(i) % stubs.size()].get());
  }
  flight.WaitForAll();
  result.duration_s = Seconds(Clock::now() - start);
  result.interrupted = flight.cancelled();
  return result;
}

}  // namespace nibble
