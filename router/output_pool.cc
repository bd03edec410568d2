#include "router/output_pool.h"

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "router/replica_metrics.h"

namespace nibble {

OutputPool::OutputPool(uint32_t threads, RequestMetrics* metrics) : metrics_(metrics) {
  for (uint32_t i = 0; i < threads; ++i) lanes_.push_back(std::make_unique<Lane>());
  for (auto& lane : lanes_) lane->thread = std::thread(&OutputPool::Run, this, lane.get());
}

OutputPool::~OutputPool() {
  for (auto& lane : lanes_) {
    std::lock_guard<std::mutex> lock(lane->mutex);
    lane->ending = true;
    lane->work_came.notify_one();
    lane->work_taken.notify_all();
  }
  for (auto& lane : lanes_) lane->thread.join();
}

void OutputPool::Open(std::shared_ptr<OutputStream> stream) {
  Lane* lane = LaneOf(stream->first_sequence_id());
  std::lock_guard<std::mutex> lock(lane->mutex);
  lane->work.opened.push_back(std::move(stream));
  lane->work_came.notify_one();
}

void OutputPool::Close(uint64_t first_sequence_id) {
  Lane* lane = LaneOf(first_sequence_id);
  std::lock_guard<std::mutex> lock(lane->mutex);
  lane->work.closed.push_back(first_sequence_id);
  lane->work_came.notify_one();
}

void OutputPool::Deliver(std::vector<SequenceEvent>* events) {
  for (auto& lane : lanes_) {
    std::unique_lock<std::mutex> lock(lane->mutex);
    lane->work_taken.wait(lock, [&] { return lane->work.events.size() < kMaxQueuedEvents || lane->ending; });
    const size_t before = lane->work.events.size();
    for (SequenceEvent& event : *events) {
      if (LaneOf(event.sequence_id) == lane.get()) lane->work.events.push_back(std::move(event));
    }
    const bool came = lane->work.events.size() > before;
    lock.unlock();
    if (came) lane->work_came.notify_one();
  }
  events->clear();
}

void OutputPool::Run(Lane* lane) {
  absl::flat_hash_map<uint64_t, std::shared_ptr<OutputStream>> streams;  // by first sequence id
  std::vector<OutputStream*> touched;
  Work work;
  double cpu = ThreadCpuSeconds();
  while (true) {
    {
      std::unique_lock<std::mutex> lock(lane->mutex);
      lane->work_came.wait(lock, [&] { return !lane->work.empty() || lane->ending; });
      if (lane->work.empty()) return;
      std::swap(work, lane->work);
    }
    lane->work_taken.notify_all();
    for (auto& stream : work.opened) {
      // One that is over may have been closed already; one that is not will be.
      const uint64_t id = stream->first_sequence_id();
      if (!stream->over()) streams.emplace(id, std::move(stream));
    }
    for (SequenceEvent& event : work.events) {
      const auto found = streams.find(event.sequence_id / kMaxSequencesPerRequest * kMaxSequencesPerRequest);
      if (found == streams.end()) continue;
      found->second->Consume(std::move(event));
      touched.push_back(found->second.get());
    }
    for (OutputStream* stream : touched) stream->Advance();
    for (const uint64_t id : work.closed) streams.erase(id);
    touched.clear();
    work.opened.clear();
    work.events.clear();
    work.closed.clear();
    const double now = ThreadCpuSeconds();
    metrics_->output_cpu_seconds().Increment(now - cpu);
    cpu = now;
  }
}

}  // namespace nibble
