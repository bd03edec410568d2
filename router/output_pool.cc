#include "router/output_pool.h"

#include <deque>
#include <optional>
#include <utility>

#include "router/replica_metrics.h"

namespace nibble {

OutputPool::OutputPool(uint32_t threads, RequestMetrics* metrics) : metrics_(metrics) {
  for (uint32_t i = 0; i < threads; ++i) queues_.push_back(std::make_unique<BoundedQueue<Batch>>(kMaxBatches));
  for (auto& queue : queues_) threads_.emplace_back(&OutputPool::Run, this, queue.get());
}

OutputPool::~OutputPool() {
  for (auto& queue : queues_) queue->Close();
  for (auto& thread : threads_) thread.join();
}

void OutputPool::Deliver(std::vector<SequenceEvent>* events) {
  const TimePoint now = Clock::now();
  if (queues_.size() == 1) {
    if (!queues_[0]->Push({now, std::move(*events)})) return;
    events->clear();
    return;
  }
  std::vector<std::vector<SequenceEvent>> parts(queues_.size());
  for (auto& part : parts) part.reserve(events->size());
  for (SequenceEvent& event : *events) {
    const uint64_t stream = event.output->first_sequence_id() / kMaxSequencesPerRequest;
    parts[stream % parts.size()].push_back(std::move(event));
  }
  events->clear();
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].empty() && !queues_[i]->Push({now, std::move(parts[i])})) return;  // closed: the router is ending
  }
}

void OutputPool::Run(BoundedQueue<Batch>* queue) {
  std::vector<std::shared_ptr<OutputStream>> touched;
  double cpu = ThreadCpuSeconds();
  while (std::optional<Batch> first = queue->Pop()) {
    std::deque<Batch> batches = queue->PopAll();
    batches.push_front(std::move(*first));
    for (Batch& batch : batches) {
      for (SequenceEvent& event : batch.events) {
        OutputStream& stream = *event.output;
        if (!stream.touched) {
          stream.touched = true;
          touched.push_back(event.output);
        }
        stream.Consume(std::move(event), batch.committed_at);
      }
    }
    for (auto& stream : touched) {
      stream->touched = false;
      stream->Advance();
    }
    touched.clear();
    const double now = ThreadCpuSeconds();
    metrics_->output_cpu_seconds().Increment(now - cpu);
    cpu = now;
  }
}

}  // namespace nibble
