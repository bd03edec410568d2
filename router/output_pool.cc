#include "router/output_pool.h"

#include <deque>
#include <optional>
#include <utility>

#include "router/replica_metrics.h"

namespace nibble {

OutputPool::OutputPool(uint32_t threads, RequestMetrics* metrics) : metrics_(metrics) {
  for (uint32_t i = 0; i < threads; ++i) queues_.push_back(std::make_unique<BoundedQueue<Batch>>(kMaxBatches));
  for (uint32_t i = 0; i < threads; ++i) threads_.emplace_back(&OutputPool::Run, this, i);
}

OutputPool::~OutputPool() {
  for (auto& queue : queues_) queue->Close();
  for (auto& thread : threads_) thread.join();
}

void OutputPool::Deliver(std::vector<SequenceEvent>* events) {
  const TimePoint now = Clock::now();
  const auto shared = std::make_shared<std::vector<SequenceEvent>>(std::move(*events));
  events->clear();
  for (auto& queue : queues_) {
    if (!queue->Push({now, shared})) return;  // closed: the router is ending
  }
}

void OutputPool::Run(size_t thread) {
  BoundedQueue<Batch>* const queue = queues_[thread].get();
  std::vector<std::shared_ptr<OutputStream>> touched;
  double cpu = ThreadCpuSeconds();
  while (std::optional<Batch> first = queue->Pop()) {
    std::deque<Batch> batches = queue->PopAll();
    batches.push_front(std::move(*first));
    for (Batch& batch : batches) {
      for (SequenceEvent& event : *batch.events) {
        if (event.sequence_id / kMaxSequencesPerRequest % queues_.size() != thread) continue;
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
