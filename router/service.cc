#include "router/service.h"

#include <memory>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/log.h"
#include "common/base/version.h"
#include "common/rpc/status.h"
#include "router/output.h"
#include "router/replica_metrics.h"

namespace nibble {
namespace {

constexpr std::chrono::milliseconds kRetryAfter{1000};
constexpr size_t kInlineBytes = 4096;        // encoding this much costs a callback thread a millisecond at most
constexpr size_t kPoolQueue = 1024;

std::string RandomRequestId() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return absl::StrFormat("gen-%016x", generator());
}

TimePoint Deadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return TimePoint::max();
  const auto left = deadline - std::chrono::system_clock::now();
  if (left > std::chrono::hours(24 * 365)) return TimePoint::max();
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(left);
}

absl::Status Busy() {
  return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat("too many long prompts wait to be encoded, the limit is ",
                                                                  kPoolQueue)),
                        kRetryAfter);
}

// Leaves *bytes as it is: it belongs to gRPC.
template <typename Message>
absl::Status Parse(const grpc::ByteBuffer& bytes, Message* message) {
  grpc::ByteBuffer copy(bytes);  // of references
  if (grpc::SerializationTraits<Message>::Deserialize(&copy, message).ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the message is not a ", Message::descriptor()->full_name(),
                                                 ", or one of its strings is not UTF-8"));
}

template <typename Message>
void Serialize(const Message& message, grpc::ByteBuffer* bytes) {
  bool own_buffer = false;
  bytes->Clear();
  grpc::SerializationTraits<Message>::Serialize(message, bytes, &own_buffer);
}

grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status, Audience::kClient));
  return reactor;
}

}  // namespace

// The reactor of one Generate. The stream decides what is called when; here is only gRPC. Deletes itself in OnDone, which
// comes after Finish, which the stream reaches on every path.
class InferenceService::GenerateCall : public grpc::ServerWriteReactor<grpc::ByteBuffer>, private StreamWriter {
 public:
  GenerateCall(InferenceService* service, grpc::CallbackServerContext* context)
      : service_(service), context_(context) {
    const uint64_t id = service_->next_sequence_id_.fetch_add(kMaxSequencesPerRequest);
    stream_ = std::make_shared<OutputStream>(static_cast<StreamWriter*>(this), service_->tokenizer_,
                                             service_->metrics_, id,
                                             [fleet = service_->fleet_](uint64_t sequence) { fleet->Cancel(sequence); });
    service_->metrics_->streams().Increment();
    std::lock_guard<std::mutex> lock(service_->mutex_);
    service_->calls_.insert(this);
  }

  const std::shared_ptr<OutputStream>& stream() const { return stream_; }

 private:
  void OnWriteDone(bool ok) override { stream_->OnWriteDone(ok); }
  void OnCancel() override { stream_->OnCancel(); }
  void OnDone() override {
    service_->metrics_->streams().Decrement();
    service_->output_->Close(stream_->first_sequence_id());
    {
      std::lock_guard<std::mutex> lock(service_->mutex_);
      service_->calls_.erase(this);
      if (service_->calls_.empty()) service_->idle_.notify_all();
    }
    delete this;
  }

  void Write(const v1::GenerateResponse& response) override {
    Serialize(response, &written_);
    StartWrite(&written_);
  }
  void WriteAndFinish(const v1::GenerateResponse& response) override {
    Serialize(response, &written_);
    StartWriteAndFinish(&written_, grpc::WriteOptions(), grpc::Status::OK);
  }
  void Finish(const absl::Status& status) override {
    grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(ToGrpcStatus(status, Audience::kClient));
  }
  void Cancel() override { context_->TryCancel(); }

  InferenceService* const service_;
  grpc::CallbackServerContext* const context_;
  std::shared_ptr<OutputStream> stream_;
  grpc::ByteBuffer written_;
};

InferenceService::InferenceService(const ServiceOptions& options, const Tokenizer* tokenizer, const Intake* intake,
                                   Fleet* fleet, OutputPool* output, RequestMetrics* metrics)
    : options_(options), tokenizer_(tokenizer), intake_(intake), fleet_(fleet), output_(output), metrics_(metrics),
      pool_queue_(kPoolQueue) {
  for (uint32_t i = 0; i < options_.tokenizer_threads; ++i) pool_.emplace_back(&InferenceService::PoolThread, this);
}

InferenceService::~InferenceService() {
  pool_queue_.Close();
  for (auto& thread : pool_) thread.join();
}

void InferenceService::Drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
}

bool InferenceService::WaitIdle(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return idle_.wait_for(lock, timeout, [this] { return calls_.empty(); });
}

void InferenceService::FailAll(const absl::Status& status) {
  std::vector<std::shared_ptr<OutputStream>> streams;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (GenerateCall* call : calls_) streams.push_back(call->stream());
  }
  for (const auto& stream : streams) stream->Fail(status);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                                       const grpc::ByteBuffer* bytes) {
  auto* call = new GenerateCall(this, context);
  const std::shared_ptr<OutputStream> stream = call->stream();
  const auto request = std::make_shared<v1::GenerateRequest>();
  if (absl::Status status = Parse(*bytes, request.get()); !status.ok()) {
    stream->Fail(status);
  } else {
    Start(request, stream, Deadline(*context));
  }
  return call;
}

void InferenceService::Start(std::shared_ptr<const v1::GenerateRequest> request,
                             const std::shared_ptr<OutputStream>& stream, TimePoint deadline) {
  const TimePoint arrived_at = Clock::now();
  bool draining = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    draining = draining_;
  }
  if (draining) {
    stream->Fail(WithRetryAfter(absl::UnavailableError("the router is draining"), kRetryAfter));
  } else if (absl::Status status = intake_->Check(*request); !status.ok()) {
    stream->Fail(status);
  } else if (Intake::InputBytes(*request) <= kInlineBytes) {
    Begin(*request, stream, arrived_at, deadline);
  } else {
    const bool queued = RunOnPool([this, request = std::move(request), stream, arrived_at, deadline] {
      if (!stream->cancelled(0)) Begin(*request, stream, arrived_at, deadline);
    });
    if (!queued) stream->Fail(Busy());
  }
}

void InferenceService::Begin(const v1::GenerateRequest& request, const std::shared_ptr<OutputStream>& stream,
                             TimePoint arrived_at, TimePoint deadline) {
  auto admitted = intake_->Admit(request);
  if (!admitted.ok()) {
    stream->Fail(admitted.status());
    return;
  }
  const v1::SamplingParams& params = request.sampling_params();
  OutputOptions options{
      .request_id = request.request_id().empty() ? RandomRequestId() : request.request_id(),
      .n = static_cast<uint32_t>(admitted->size()),
      .min_tokens = params.min_tokens(),
      .stop = {params.stop().begin(), params.stop().end()},
      .include_stop_str = params.include_stop_str_in_output(),
      .skip_special_tokens = !params.has_skip_special_tokens() || params.skip_special_tokens(),
      .prompt_logprobs = params.has_prompt_logprobs(),
      .num_prompt_tokens = (*admitted)[0]->num_prompt_tokens,
      .max_tokens = (*admitted)[0]->max_tokens,
      .max_buffered_tokens = options_.max_buffered_tokens,
      .stall_timeout = options_.stall_timeout,
      .arrived_at = arrived_at,
  };
  LogDebug("generate request_id={} prompt_tokens={} n={} max_tokens={}", options.request_id,
           options.num_prompt_tokens, options.n, options.max_tokens);
  stream->Configure(std::move(options));
  output_->Open(stream);
  for (auto& sequence : *admitted) {
    sequence->id = stream->first_sequence_id() + sequence->index;
    sequence->output = stream;
    sequence->deadline = deadline;
  }
  if (absl::Status status = fleet_->Submit(*std::move(admitted)); !status.ok()) stream->Fail(status);
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* bytes, grpc::ByteBuffer* response_bytes) {
  const auto request = std::make_shared<v1::TokenizeRequest>();
  if (absl::Status status = Parse(*bytes, request.get()); !status.ok()) return FinishNow(context, status);
  const auto encode = [this, request, response_bytes]() -> absl::Status {
    auto ids = intake_->Encode(*request);
    if (!ids.ok()) return ids.status();
    v1::TokenizeResponse response;
    response.mutable_input_ids()->Add(ids->begin(), ids->end());
    Serialize(response, response_bytes);
    return absl::OkStatus();
  };
  if (Intake::InputBytes(*request) <= kInlineBytes) return FinishNow(context, encode());
  // Response and reactor live until Finish.
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  if (!RunOnPool([encode, reactor] { reactor->Finish(ToGrpcStatus(encode(), Audience::kClient)); })) {
    reactor->Finish(ToGrpcStatus(Busy(), Audience::kClient));
  }
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  auto text = intake_->Decode(*request);
  if (!text.ok()) return FinishNow(context, text.status());
  response->set_text(*std::move(text));
  return FinishNow(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetModelInfoRequest* request,
                                                         v1::GetModelInfoResponse* response) {
  *response = options_.model_info;
  return FinishNow(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::GetStatus(grpc::CallbackServerContext* context,
                                                      const v1::GetStatusRequest* request,
                                                      v1::GetStatusResponse* response) {
  response->set_version(kVersion);
  response->set_uptime_seconds(std::chrono::duration<double>(Clock::now() - started_at_).count());
  for (const ReplicaReport& report : fleet_->Reports()) {
    v1::ReplicaStatus* replica = response->add_replicas();
    replica->set_index(report.index);
    replica->set_ready(report.ready);
    replica->set_state(ReplicaStateName(report.state));
    replica->set_last_error(report.last_error);
    for (const std::string& worker : report.workers) replica->add_workers(worker);
    replica->set_num_requests_running(report.stats.running);
    replica->set_num_requests_waiting(report.stats.waiting);
    replica->set_total_pages(report.stats.total_pages);
    replica->set_free_pages(report.stats.free_pages);
    replica->set_cached_pages(report.stats.cached_pages);
    replica->set_steps(report.stats.steps);
    replica->set_generation_tokens_per_second(report.generation_tokens_per_second);
  }
  return FinishNow(context, absl::OkStatus());
}

bool InferenceService::RunOnPool(std::function<void()> task) { return pool_queue_.TryPush(std::move(task)); }

void InferenceService::PoolThread() {
  double cpu = ThreadCpuSeconds();
  while (std::optional<std::function<void()>> task = pool_queue_.Pop()) {
    (*task)();
    task.reset();
    const double now = ThreadCpuSeconds();
    metrics_->tokenizer_cpu_seconds().Increment(now - cpu);
    cpu = now;
  }
}

}  // namespace nibble
