// The threads between the schedulers and the clients' streams.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "router/output.h"
#include "router/request_metrics.h"
#include "router/sequence.h"

namespace nibble {

// A stream belongs to one thread, which its first sequence id picks, and its events are consumed there in order. That
// thread alone knows streams by id; schedulers hand over records without a pointer in them, so that a token costs the
// scheduler's thread neither a reference count nor an allocation.
class OutputPool {
 public:
  // `metrics` outlives the pool.
  OutputPool(uint32_t threads, RequestMetrics* metrics);
  ~OutputPool();  // consumes what is queued, then ends

  // Before the stream's sequences are given to a scheduler.
  void Open(std::shared_ptr<OutputStream> stream);
  // Once the stream is over, opened or not: its events are dropped from now on. Never waits.
  void Close(uint64_t first_sequence_id);

  // Takes events, of one step or a few; *events is left empty and keeps its memory. Waits only when an output thread is
  // kMaxQueuedEvents behind, which no client can cause: they never wait for one.
  void Deliver(std::vector<SequenceEvent>* events);

 private:
  static constexpr size_t kMaxQueuedEvents = 1 << 16;

  // What one thread has to do, in this order: an event finds its stream open, and closing comes behind the last event.
  struct Work {
    std::vector<std::shared_ptr<OutputStream>> opened;
    std::vector<SequenceEvent> events;
    std::vector<uint64_t> closed;

    bool empty() const { return opened.empty() && events.empty() && closed.empty(); }
  };
  struct Lane {
    std::mutex mutex;
    std::condition_variable work_came, work_taken;
    Work work;
    bool ending = false;
    std::thread thread;
  };

  Lane* LaneOf(uint64_t sequence_id) const {
    return lanes_[sequence_id / kMaxSequencesPerRequest % lanes_.size()].get();
  }
  void Run(Lane* lane);

  RequestMetrics* const metrics_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace nibble
